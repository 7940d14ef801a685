"""`python -m benchmarks.localization MODEL [FOLDER]`: how well the heat maps of a model of the smoke recipe point, in a world
where most of what is seen is silent. MODEL: a run's folder, such as `longer` of `python -m benchmarks.learning`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from equiav import cli
from equiav.config import DataConfig
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import Rules, World
from streaming import Store
from streaming.pack import pack

SEED, CLIPS, SILENT = 77, 200, 0.6


def main() -> int:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[2] if len(sys.argv) > 2 else temporary)
        world = World(SEED, 64, 10, 2.56, rules=Rules(silent=SILENT))
        encode = EncodeSynthetic(world, Shape(10, 64, 90, "wav", 30.0, True, DataConfig(silence=0.0)))
        items = [(f"synthetic-{SEED}-{k}", k) for k in range(CLIPS)]
        pack(items, encode, Store(str(folder / "clips")), processes=0, part_items=64)
        return cli.main(["eval", "localize", "--weights", sys.argv[1], "--stream.url", str(folder / "clips"), "--out",
                         str(folder / "out"), "--world.silent", str(SILENT), "--stream.workers", "0"])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
