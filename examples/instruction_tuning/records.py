"""What one training run is told and what it reports, as the JSON files through which its process is talked to."""

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path


class Noise(str, Enum):
    """Who adds the noise in a run."""

    OFF = "no noise"
    TRAINER = "Trainer neftune_noise_alpha"
    NEFT_KERNELS = "neft_kernels"


@dataclass(frozen=True)
class RunSettings:
    noise: Noise
    model: str  # a name on the hub or a folder
    examples: str  # a file that Examples.save wrote
    output: str  # the folder for Trainer's files
    alpha: float
    steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    lora: bool  # else all weights are trained
    seed: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> "RunSettings":
        fields = json.loads(path.read_text())
        return cls(**{**fields, "noise": Noise(fields["noise"])})


@dataclass(frozen=True)
class CurvePoint:
    """Mean loss per answer token after `step` updates, in eval mode and so without noise."""

    step: int
    train_loss: float
    held_out_loss: float


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    answer: str


@dataclass(frozen=True)
class RunResult:
    noise: Noise
    device: str
    curve: list[CurvePoint]
    embedding_ms: list[float]  # one training forward of the embedding with all its hooks, many times
    look_up_ms: list[float]  # the bare look-up of the same ids, timed in turn with it
    peak_memory_bytes: int
    peak_memory_kind: str  # what was measured
    answers: list[Answer]  # to the first held-out questions, by the trained model
    untrained_answers: list[Answer]  # the same before training; of the run without noise alone
    description: str  # str(describe(model))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> "RunResult":
        fields = json.loads(path.read_text())
        curve = [CurvePoint(**point) for point in fields["curve"]]
        answers = {key: [Answer(**each) for each in fields[key]] for key in ("answers", "untrained_answers")}
        return cls(**{**fields, **answers, "noise": Noise(fields["noise"]), "curve": curve})
