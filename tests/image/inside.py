"""Runs in the image: nothing of it can be written, the wheels need no library of Debian's, all modules are compiled."""

import errno
import importlib
import io
import os
import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

import av
import numpy as np
import simplejpeg
import soundfile
import torch
import torchaudio
import torchvision

assert (os.getresuid(), os.getresgid(), os.getgroups()) == ((10001,) * 3, (10001,) * 3, []), os.getresuid()
status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, status
assert status["NoNewPrivs"] == "1"
for folder in ("/", "/etc", "/opt/equiav", "/opt/equiav/bin", "/var/tmp", "/run", "/dev"):
    refusal = None
    try:
        Path(folder, "written").touch()
    except OSError as error:
        refusal = error.errno
    assert refusal == errno.EROFS, f"{folder}: {refusal}"  # a root that is read-only, not want of a permission
assert Path.home() == Path("/tmp") == Path.cwd()
Path("written").touch()
print("user 10001, no capabilities; / cannot be written, /tmp can")

for module in ("equiav.cli", "equiav.commands.pack", "equiav.commands.pretrain"):
    importlib.import_module(module)
assert torchaudio.compliance.kaldi.fbank(torch.randn(1, 16000)).shape[1] == 23
assert torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5).tolist() == [0]  # compiled code of torchvision
sound = io.BytesIO()
soundfile.write(sound, np.zeros(16000, np.int16), 16000, format="FLAC")
sound.seek(0)
assert len(soundfile.read(sound)[0]) == 16000
picture = np.full((64, 64, 3), 200, np.uint8)
assert abs(int(simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(picture)).mean()) - 200) <= 1
with av.open("video.mp4", "w") as video:
    stream = video.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for packet in [*stream.encode(av.VideoFrame.from_ndarray(picture)), *stream.encode(None)]:
        video.mux(packet)
with av.open("video.mp4") as video:
    assert len(list(video.decode(video=0))) == 1
rclone = shutil.which("rclone")
assert rclone is not None
assert Path(rclone).is_relative_to("/opt/equiav")
version = subprocess.run([rclone, "version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
print(f"torch {torch.__version__}, torchaudio, torchvision, soundfile, av, simplejpeg, {version} work")

# A module without bytecode, or with that of another source, would be compiled at every start anew.
stale = []
files = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
loaded = sorted(name for name in files if name.startswith("/") and name.endswith(".py"))  # torch invents some
for name in loaded:
    cached = Path(cache_from_source(name))
    source = os.stat(name)
    header = cached.read_bytes()[4:16] if cached.exists() else b""
    expected = [0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF]  # PEP 552
    if np.frombuffer(header, "<u4").tolist() != expected:
        stale.append(name)
assert not stale, f"{len(stale)} of {len(loaded)} modules have no bytecode: {stale[:5]}"
print(f"all {len(loaded)} modules loaded here are compiled")
