"""Make the demo's model folder and dataset: python demo/build.py FOLDER."""

import sys
from pathlib import Path

from data import write_dataset
from llava import save_llava

PICTURES, PROSE = 2400, 1600


def main(folder: Path) -> None:
    save_llava(folder / "model")
    write_dataset(folder / "data", PICTURES, PROSE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
