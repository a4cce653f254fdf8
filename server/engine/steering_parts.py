"""The members of a steered model, loaded and checked: which checkpoints, and how each reads a request's prompt.

Pairs that name the same checkpoint under the same prompt share a member, and what is the target itself under the
target's prompt is the base.
"""

from dataclasses import dataclass
from pathlib import Path

from paceline.server.config.schema import ModelSpec, SteeringConfig
from paceline.server.config.steering import SELF, strength_of
from paceline.server.decoding.mixture import BASE, Pair
from paceline.server.engine.interface import PromptView, Tokenizer
from paceline.server.errors import ConfigError
from paceline.server.models.loader import LoadedModel, ModelLoader
from paceline.server.models.manifest import check_tokenizer
from paceline.server.models.sources import resolve
from paceline.server.models.tokenizer import HfTokenizer, load_tokenizer, same_tokenizer_files

#: Template of a member that is its checkpoint's own.
_OWN = "own"


@dataclass(frozen=True)
class MemberPart:
    """A member beside the target; ``name`` is what messages call it."""

    name: str
    loaded: LoadedModel
    view: PromptView


@dataclass(frozen=True)
class SteeringParts:
    """Pairs, and the members from index 1 on."""

    pairs: tuple[Pair, ...]
    members: tuple[MemberPart, ...]


def load_steering(
    spec: ModelSpec, target: LoadedModel, tokenizer: HfTokenizer, loader: ModelLoader
) -> SteeringParts | None:
    """Load what steers a model; None if nothing does.

    Members run in the format that ``spec`` gives the target; "auto" decides for each.

    Raises:
        UserError: a member that cannot be found or loaded, or whose tokenizer is not the target's.
    """
    if not spec.steering:
        return None
    book = _Book(spec, target, tokenizer, loader)
    pairs = tuple(book.pair(config) for config in spec.steering)
    return SteeringParts(pairs, tuple(book.members.values()))


class _Book:
    """Who is a member already, by what makes one: checkpoint, template, prefix, prompt."""

    def __init__(
        self, spec: ModelSpec, target: LoadedModel, tokenizer: HfTokenizer, loader: ModelLoader
    ) -> None:
        self._spec, self._target, self._tokenizer, self._loader = spec, target, tokenizer, loader
        self._indexes: dict[tuple[str | None, ...], int] = {(target.key, None, None, None): BASE}
        self.members: dict[int, MemberPart] = {}

    def pair(self, config: SteeringConfig) -> Pair:
        expert = None
        if config.expert is not None:
            expert = self._member(
                config, config.expert, config.expert_template, prefix=config.response_prefix
            )
        anti = self._member(config, config.anti_expert, config.anti_template, prompt=config.anti_prompt)
        return Pair(
            name=config.name,
            mode=config.mode,
            expert=expert,
            anti_expert=anti,
            strength=strength_of(config),
            limits=config.limits,
            support=config.support,
            top_p=config.support_top_p,
        )

    def _member(
        self,
        config: SteeringConfig,
        reference: str,
        template: str | None,
        *,
        prefix: str | None = None,
        prompt: str | None = None,
    ) -> int:
        loaded, tokenizer = self._target, self._tokenizer
        if reference != SELF:
            loaded, tokenizer = self._load(config, reference)
        key = (loaded.key, template, prefix, prompt)
        if key not in self._indexes:
            index = self._indexes[key] = len(self._indexes)
            view = PromptView(self._template(config, template, tokenizer), prefix, prompt)
            self.members[index] = MemberPart(f"{reference} (pair {config.name})", loaded, view)
        return self._indexes[key]

    def _load(self, config: SteeringConfig, reference: str) -> tuple[LoadedModel, HfTokenizer]:
        path = resolve(reference)
        tokenizer = self._tokenizer
        if not same_tokenizer_files(path, self._target.path) or _OWN in (
            config.expert_template,
            config.anti_template,
        ):
            tokenizer = load_tokenizer(path)
            check_tokenizer(self._tokenizer.sha256, tokenizer.sha256, who=f"steering model {reference}")
        loaded = self._loader.load(path, self._spec.weights, target=self._target.path)
        if loaded.config.reads_state or loaded.config.head_rows != loaded.config.vocab_size:
            raise ConfigError(
                f"{path} can only draft: a steering model needs logits for every token, from its own text alone"
            )
        return loaded, tokenizer

    def _template(self, config: SteeringConfig, template: str | None, own: HfTokenizer) -> Tokenizer | None:
        if template is None:
            return None
        if template != _OWN:
            return own.with_template(_read(Path(template), config))
        if not own.has_chat_template:
            raise ConfigError(
                f'steering pair "{config.name}": template "own", but the checkpoint has no chat template; name a '
                "Jinja file"
            )
        return own


def _read(path: Path, config: SteeringConfig) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'steering pair "{config.name}": template {path} cannot be read ({error}); write "own", "target" or the '
            "path of a Jinja file"
        ) from error
