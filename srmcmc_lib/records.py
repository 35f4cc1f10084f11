"""What an update of Algorithm 1 saw, and logs of it: CSV files or TensorBoard folders."""

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """What one update of Algorithm 1 saw; yielded after the update.

    Attributes:
        step: updates done so far, from 1.
        d: mean f(x⁺) − mean f(x⁻) before the update; swings around a value a little above 0 when learning is healthy.
        grad_norm: ‖∂f/∂x‖₂ of one image, averaged over the batch and the K steps. K · grad_norm hardly
            depends on K (39 … 49 on CIFAR-10, Table 2) and grows as the root of the number of pixel values.
        rate, sigma: η and σ of this update.
        seconds: spent in training so far, earlier runs included.
    """

    step: int
    d: float
    grad_norm: float
    rate: float
    sigma: float
    seconds: float


def read_log(path: str | Path) -> list[Record]:
    """The records of a CSV log, in order."""
    return [Record(int(row.pop("step")), **{k: float(v) for k, v in row.items()}) for row in _whole_rows(Path(path))]


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Without a row that a killed run left unfinished."""
    text = path.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def open_log(target: str | Path, step: int) -> Callable[[Record], None]:
    """A function that appends a Record to a CSV file (rows beyond `step` are dropped) or to a TensorBoard folder."""
    if not str(target).endswith(".csv"):
        from torch.utils.tensorboard import SummaryWriter  # optional: pip install tensorboard

        writer = SummaryWriter(str(target), purge_step=step + 1)
        return lambda r: [writer.add_scalar(k, v, r.step) for k, v in asdict(r).items() if k != "step"]

    path, names = Path(target), [f.name for f in fields(Record)]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in _whole_rows(path) if int(row["step"]) <= step] if step and path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)

    def write(record: Record) -> None:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, names).writerow(asdict(record))

    return write
