"""Embeddings in a file: of what, from when to when, of its sound and of its picture. The ending says how they are written."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from equiav.config import ConfigError, NotHere
from equiav.files import temporary_sibling

ENDINGS = (".npz", ".parquet", ".safetensors", ".npy", ".faiss")
SIDES = ("audio", "image")


class Vectors(NamedTuple):
    """A row for each part of a file, or for each clip of a dataset. Rows that are not a number: it has none."""

    name: np.ndarray  # (n,) text
    begin: np.ndarray  # (n,) seconds
    end: np.ndarray  # (n,)
    audio: np.ndarray  # (n, d) float32, L2-normalised
    image: np.ndarray  # (n, d)
    model: str = ""  # digest of the model that made them

    def write(self, out: Path) -> None:
        """All of it, or nothing."""
        part = temporary_sibling(out)
        try:
            WRITE[out.suffix](self, part, out)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)


def together(parts: Sequence[Vectors]) -> Vectors:
    columns = (np.concatenate(column) for column in zip(*(part[:-1] for part in parts), strict=True))
    return Vectors(*columns, model=parts[0].model)


def check_ending(out: Path) -> None:
    if out.suffix not in ENDINGS:
        raise ConfigError(f"out is {out}, expected a name that ends in {', '.join(ENDINGS)}")
    if module := {".parquet": "pyarrow", ".faiss": "faiss"}.get(out.suffix):
        try:
            __import__(module)
        except ModuleNotFoundError:
            raise NotHere(
                f"{module} is not installed, which writes {out.suffix}; `pip install 'equiav[search]'` brings it"
            ) from None


def _npz(of: Vectors, part: Path, out: Path) -> None:
    np.savez(part, **{**of._asdict(), "model": np.array(of.model)})


def _parquet(of: Vectors, part: Path, out: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    def rows(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    columns = {"name": pa.array(of.name.tolist()), "begin": pa.array(of.begin), "end": pa.array(of.end)}
    table = pa.table({**columns, "audio": rows(of.audio), "image": rows(of.image)})
    write_table(table.replace_schema_metadata({"model": of.model}), part)


def _safetensors(of: Vectors, part: Path, out: Path) -> None:
    from safetensors.numpy import save_file

    numbers = {name: np.ascontiguousarray(getattr(of, name)) for name in ("begin", "end", "audio", "image")}
    save_file(numbers, part, metadata={"name": json.dumps(of.name.tolist()), "model": of.model})


def _npy(of: Vectors, part: Path, out: Path) -> None:
    """(n, 2, d): the sound's and the picture's. NAME.npy.csv says of what."""
    _table(of, _beside(out))
    with part.open("wb") as file:
        np.save(file, np.stack([of.audio, of.image], axis=1))


def _faiss(of: Vectors, part: Path, out: Path) -> None:
    """2 n vectors, compared by their inner product: number 2 k is the sound of row k of NAME.faiss.csv, 2 k + 1 its picture. What
    a row lacks is a vector of zeros, which is near nothing."""
    import faiss

    _table(of, _beside(out))
    both = np.nan_to_num(np.stack([of.audio, of.image], axis=1)).reshape(-1, of.audio.shape[1])
    index = faiss.IndexFlatIP(both.shape[1])
    index.add(np.ascontiguousarray(both, np.float32))  # type: ignore[call-arg]
    faiss.write_index(index, str(part))


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.csv")


def _table(of: Vectors, path: Path) -> None:
    part = temporary_sibling(path)
    with part.open("w", newline="") as file:
        written = csv.writer(file)
        written.writerow(("name", "begin", "end", "model"))
        rows = zip(of.name.tolist(), of.begin.tolist(), of.end.tolist(), strict=True)
        written.writerows((*row, of.model) for row in rows)
    part.replace(path)


WRITE = {".npz": _npz, ".parquet": _parquet, ".safetensors": _safetensors, ".npy": _npy, ".faiss": _faiss}


def read(path: Path) -> Vectors:
    """What `Vectors.write` wrote. Nothing in it is run."""
    try:
        return checked(READ[path.suffix](path))
    except KeyError as error:
        if path.suffix not in READ:
            raise ConfigError(f"{path}: its name ends in {path.suffix!r}, expected {', '.join(READ)}") from None
        raise ConfigError(f"{path} has no {error}: `equiav embed` did not write it") from None
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: no such file; `equiav embed` writes it") from None
    except ModuleNotFoundError as error:
        raise NotHere(f"{error.name} is not installed; `pip install 'equiav[search]'` brings it") from None
    except Exception as error:  # whatever a library has to say of a file that may be anything
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def checked(found: Vectors) -> Vectors:
    n = len(found.name)
    shapes = [found.begin.shape, found.end.shape, found.audio.shape[:1], found.image.shape[:1]]
    if any(shape != (n,) for shape in shapes) or found.audio.ndim != 2 or found.audio.shape != found.image.shape:
        raise ConfigError(f"columns of {n} names have shapes {shapes}, {found.audio.shape}, {found.image.shape}")
    return found


def _read_npz(path: Path) -> Vectors:
    with np.load(path, allow_pickle=False) as file:
        return Vectors(*(file[name] for name in Vectors._fields[:-1]), model=str(file["model"]))


def _read_parquet(path: Path) -> Vectors:
    from pyarrow.parquet import read_table

    table = read_table(path)

    def rows(name: str) -> np.ndarray:
        column = table[name].combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)

    begin, end = (table[name].to_numpy() for name in ("begin", "end"))
    model = (table.schema.metadata or {})[b"model"].decode()
    return Vectors(np.array(table["name"].to_pylist()), begin, end, rows("audio"), rows("image"), model)


def _read_safetensors(path: Path) -> Vectors:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
        numbers = (file.get_tensor(of) for of in Vectors._fields[1:-1])
        return Vectors(np.array(json.loads(about["name"])), *numbers, model=about["model"])


def _rows(path: Path) -> tuple[np.ndarray, list[np.ndarray], str]:
    with _beside(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [np.array([float(row[of]) for row in rows]) for of in ("begin", "end")]
    return np.array([row["name"] for row in rows]), times, rows[0]["model"] if rows else ""


def _read_npy(path: Path) -> Vectors:
    both = np.load(path, allow_pickle=False)
    name, (begin, end), model = _rows(path)
    return Vectors(name, begin, end, both[:, 0], both[:, 1], model)


def _read_faiss(path: Path) -> Vectors:
    import faiss

    index = faiss.read_index(str(path))
    both = index.reconstruct_n(0, index.ntotal).reshape(-1, 2, index.d)
    both[(both == 0).all(axis=2)] = np.nan
    name, (begin, end), model = _rows(path)
    return Vectors(name, begin, end, both[:, 0], both[:, 1], model)


READ = {
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".safetensors": _read_safetensors,
    ".npy": _read_npy,
    ".faiss": _read_faiss,
}
