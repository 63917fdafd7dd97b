"""Generate serving/protos/ from protos/.

    python scripts/generate_protos.py       # or `make protos`, which sets up what it needs

Needs grpcio-tools of exactly this version, in an environment of its own: its code runs on protobuf 6.31.1 to 7.x, that
of newer ones no longer on protobuf 6, and it cannot be installed beside protobuf 7.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

TOOLS = "1.76.0"
ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "protos").glob("*.proto"))
PACKAGE = ROOT / "serving" / "protos"
SUMS = PACKAGE / "SHA256SUMS"  # of the sources and of what was made of them; `sha256sum -c` reads it, too


def generate() -> None:
    """Raises SystemExit with protoc's status when a source is wrong."""
    from grpc_tools import protoc  # type: ignore[import-not-found]

    for old in PACKAGE.glob("*_pb2*"):
        old.unlink()
    # protoc takes the sources to lie in serving/protos. So the modules import each other by their full names, and the
    # names under which descriptors are registered in a process are not ones that other packages use as well.
    outputs = [f"--{kind}_out={ROOT}" for kind in ("python", "pyi", "grpc_python")]
    sources = [f"serving/protos/{s.name}" for s in SOURCES]
    if status := protoc.main(["protoc", f"--proto_path=serving/protos={ROOT / 'protos'}", *outputs, *sources]):
        sys.exit(status)
    SUMS.write_text(sums())


def sums() -> str:
    """The sums of the files as they are: a line "digest  path" each."""
    files = [*SOURCES, *sorted(PACKAGE.glob("*_pb2*"))]
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(ROOT)}\n" for f in files)


def main() -> None:
    try:
        found = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != TOOLS:
        sys.exit(f"grpcio-tools: found {found}, expected {TOOLS}: run `make protos`, which sets it up")
    generate()
    print(f"{PACKAGE.relative_to(ROOT)}: generated from {', '.join(s.name for s in SOURCES)}")


if __name__ == "__main__":
    main()
