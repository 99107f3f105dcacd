"""A copy of the package's Python files: to run without compiled libraries, or with other ones."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_package(source: Path) -> Path:
    """Copies quaver into the folder `source`, for PYTHONPATH; returns where its compiled libraries would be."""
    files = {file: Path("quaver") / file.name for file in (ROOT / "src/quaver").glob("*.py")}
    files |= {
        file: Path("quaver") / file.relative_to(ROOT)
        for folder in ("kernels", "pymodels")
        for file in (ROOT / folder).rglob("*.py")
    }
    for file, name in files.items():
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return source / "quaver/kernels/_lib"
