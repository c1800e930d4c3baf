"""Text that no model of 2025 has read: python benchmarks/recent_texts.py FOLDER

Of each package below, an old release and a newer one are downloaded by pip; what is kept are stretches of consecutive
lines of the newer that occur nowhere in the older. Prose comes from documentation and changelogs, code from Python
modules; the list of what was taken is FOLDER/sources.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

# Package, a release of mid 2025, one of 2026; whether its documentation comes with its source alone.
PACKAGES = [
    ("transformers", "4.55.4", "5.24.0", False),
    ("datasets", "4.0.0", "", False),
    ("accelerate", "1.10.0", "", False),
    ("peft", "0.17.0", "", False),
    ("trl", "0.21.0", "", False),
    ("gradio", "5.42.0", "", False),
    ("fastapi", "0.116.1", "", False),
    ("starlette", "0.47.2", "", False),
    ("openai", "1.99.6", "", False),
    ("scipy", "1.16.1", "", False),
    ("scikit-learn", "1.7.1", "", False),
    ("pandas", "2.3.1", "", False),
    ("networkx", "3.5", "", True),
    ("pytest", "8.4.1", "", True),
    ("sphinx", "8.2.3", "", True),
    ("sqlalchemy", "2.0.43", "", True),
    ("django", "5.2.5", "", True),
    ("attrs", "25.3.0", "", True),
    ("pydantic", "2.11.7", "", True),
    ("trio", "0.30.0", "", True),
    ("mypy", "1.17.1", "", False),
]
PROSE, CODE = (".md", ".rst", ".txt"), (".py",)
# Lines shorter than this say too little about where they come from.
_TELLING = 20


def fetch(name: str, version: str, folder: Path, *, source: bool) -> Path:
    """One archive of a release, downloaded once."""
    place = folder / f"{name}-{version or 'newest'}"
    if not (place.exists() and any(place.iterdir())):
        wanted = f"{name}=={version}" if version else name
        kind = ["--no-binary", name] if source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "-d", str(place), wanted]
        subprocess.run(command, check=True)
    return next(place.iterdir())


def files(archive: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, text) of each file of an archive that has one of the endings, and of a wheel's description."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                if name.endswith(endings) or (endings == PROSE and name.endswith("METADATA")):
                    yield name, packed.read(name).decode(errors="ignore")
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and member.name.endswith(endings):
                handle = packed.extractfile(member)
                assert handle is not None
                yield member.name, handle.read().decode(errors="ignore")


def stretches(text: str, known: set[str], size: int) -> Iterator[str]:
    """Runs of lines of which none is known, cut to about so many bytes at the end of a line."""
    run: list[str] = []
    for line in [*text.splitlines(keepends=True), None]:
        if line is not None and not (len(line.strip()) >= _TELLING and line.strip() in known):
            run.append(line)
            continue
        taken = list[str]()
        for own in run:
            if sum(len(part.encode()) for part in taken) >= size:
                break
            taken.append(own)
        found = "".join(taken).strip("\n") + "\n"
        if size <= len(found.encode()) <= 2 * size and found.count("\n") >= 8:
            yield found
        run = []


def main(
    folder: Annotated[Path, typer.Argument(help="Where texts go; downloads are kept under it.")],
    size: Annotated[int, typer.Option(help="Bytes of a document, at least.")] = 1400,
    each: Annotated[int, typer.Option(help="Documents of a package, of each kind, at most.")] = 2,
) -> None:
    """Write FOLDER/prose/*.txt and FOLDER/code/*.txt."""
    sources = []
    for name, old, new, source in PACKAGES:
        try:
            pair = [fetch(name, version, folder / "packages", source=source) for version in (old, new)]
        except subprocess.CalledProcessError:
            typer.echo(f"{name}: not to be had", err=True)
            continue
        known = {line.strip() for _, text in files(pair[0], PROSE + CODE) for line in text.splitlines()}
        for kind, endings in (("prose", PROSE), ("code", CODE)):
            count = 0
            for path, text in files(pair[1], endings):
                if count == each:
                    break
                if (found := next(stretches(text, known, size), None)) is None or "license" in path.lower():
                    continue
                out = folder / kind / f"{name}-{count}.txt"
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(found, encoding="utf-8")
                sources.append({"file": f"{kind}/{out.name}", "release": pair[1].name, "from": path})
                count += 1
            typer.echo(f"{name}: {count} of {kind}")
    (folder / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    kinds = {kind: sum(entry["file"].startswith(kind) for entry in sources) for kind in ("prose", "code")}
    typer.echo(f"documents: {kinds}")


if __name__ == "__main__":
    typer.run(main)
