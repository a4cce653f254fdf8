"""What one kind of fine-tuning does its own way; the loop over steps is ``trainer.Trainer``'s."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from paceline.draftmodels.finetune.batch import Batch
from paceline.draftmodels.finetune.decoder import Decoder
from paceline.draftmodels.jobs.checkpoint import JobState


@dataclass
class FinetuneState(JobState):
    """How far a job is.

    Attributes:
        best_perplexity: the best measured so far.
    """

    best_perplexity: float | None = None


State = TypeVar("State", bound=FinetuneState)


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Of one step, over all its forwards on all ranks.

    Attributes:
        rows: positions that are not padding.
        loss: what was minimised, nats per learnt token where nothing else is added.
        parts: what else ``metrics.jsonl`` keeps of the step.
    """

    rows: int
    loss: float
    parts: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC, Generic[State]):
    """How gradients are made, and what else has to hold for the weights.

    Attributes:
        model: what is trained.
        parameters: what training changes of it, by checkpoint name.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.parameters: dict[str, nn.Parameter] = model.trained()

    @abstractmethod
    def backward(self, batches: Sequence[Batch], state: State, steps_left: Callable[[], float]) -> StepLosses:
        """Losses and gradients of one step's forwards on this rank.

        Every rank calls it once per step, also with no batches.

        Args:
            steps_left: an estimate, the same on all ranks.
        """

    @abstractmethod
    def measure(self) -> Mapping[str, Any]:
        """Look at the model as it would be exported; on the main rank only.

        Returns:
            At least ``perplexity`` on held-out text, ready for JSON.
        """

    def settle_gradients(self) -> None:
        """Make gradients what they must be, before they are clipped."""

    def settle_weights(self) -> None:
        """Make weights what they must be, after each step."""

    def packed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a checkpoint holds of parameters and moments (``jobs.checkpoint.training_tensors``)."""
        return tensors

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inverse of ``packed``.

        Raises:
            ArtifactError: they are of another model.
        """
        return tensors
