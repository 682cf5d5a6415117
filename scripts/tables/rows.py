"""What the tables compare: the rows, the command's flags, and the config of each row."""

import copy
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from transformers import HfArgumentParser

from clipcacg.configuration_clipcacg import check_keywords
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.baselines.logistic_regression import CHOICES, LABELS, MAJORITY_LABEL, MODALITIES
from clipcacg.scripts.data.errors import InputError, as_input_error, parse_flags
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.training.arguments import (
    CONFIGS,
    OF_TABLES,
    ModelArguments,
    RecipeArguments,
    checked,
    given_flags,
    read_config,
    yielding,
)
from clipcacg.scripts.training.checks import check_flags

WORD_VECTORS = ("cnn_multi", "dnn_lr", "co_memory", "mvan")  # the systems before BERT
WHOLE = {"modality": "both", "use_cross_attention": True, "use_gating": True, "use_modality_heads": False}
HEADS = {**WHOLE, "use_modality_heads": True}
PAPER = {"mvsa_single": (75.38, 75.21), "mvsa_multiple": (73.95, 73.83)}


class Row(NamedTuple):
    """A row of a table. `system`, `floor` or else `fields` says what is trained.

    Args:
        label: Name in the table.
        tables: Numbers of the tables that have this row.
        fields: Fields of `ModelArguments`, for CLIP-CA-CG, its ablations, and another system with modality heads.
        system: Key of `baselines.SYSTEMS`, for another system.
        floor: A simple baseline: "majority", or the modality that a logistic regression reads.
        fidelity: A, B or C; see `baselines/shared.py`.
        substitutions: What differs from the original.
        published: "mvsa_single" and "mvsa_multiple" to the paper's accuracy and F1 in percent.
    """

    label: str
    tables: tuple[int, ...]
    fields: dict[str, Any] | None = None
    system: str | None = None
    floor: str | None = None
    fidelity: str = ""
    substitutions: tuple[str, ...] = ()
    published: dict[str, tuple[float, float]] = {}


# In the order of the tables.
ROWS: dict[str, Row] = {"majority": Row(MAJORITY_LABEL, (3,), floor="majority")}
ROWS |= {f"regression_{modality}": Row(LABELS[modality], (3,), floor=modality) for modality in MODALITIES}
for name, system in sorted(SYSTEMS.items(), key=lambda item: bool(item[1].published)):
    fidelity = system.fidelity if system.published else ""
    ROWS[name] = Row(system.label, (3,), None, name, None, fidelity, system.substitutions, system.published)
    if name == "concatenation":
        fields_of_heads = {**HEADS, "clip_mode": "none"}
        ROWS["concatenation_heads"] = Row("Concatenation, modality heads", (3,), fields_of_heads, system=name)
ROWS |= {
    "image_only": Row("V only", (4,), {**WHOLE, "modality": "image"}),
    "text_only": Row("T only", (4,), {**WHOLE, "modality": "text"}),
    "no_clip": Row("w/o Clip", (4,), {**WHOLE, "clip_mode": "none"}),
    "no_cross_attention": Row("w/o CA", (4,), {**WHOLE, "use_cross_attention": False}),
    "no_gating": Row("w/o CG", (4,), {**WHOLE, "use_gating": False}),
    "full": Row("CLIP-CA-CG", (3, 4), WHOLE, published=PAPER),
    "full_heads": Row("CLIP-CA-CG, modality heads", (3, 4), HEADS),
}

# Fields that can change the scores of a simple baseline, and of another system.
OF_FLOORS = ("text_model", "vision_model", "max_length", "cache_dtype")
OF_SYSTEMS = (
    *OF_FLOORS,
    "dropout",
    "freeze_text",
    "freeze_text_layers",
    "freeze_vision",
    "freeze_vision_blocks",
    "class_weights",
    "use_modality_heads",
    "modality_loss_weight",
    "modality_combination",
)
# Beginnings of the recipe's fields that cannot change a score.
IRRELEVANT = (
    "output_dir", "overwrite_", "seed", "report_to", "disable_tqdm", "use_cpu", "resume_from", "log", "save_", "hub_",
    "push_", "dataloader_", "load_best", "hp_search", "wanted_accuracy",
)  # fmt: skip

SMALL = {"hidden_size": 48, "num_attention_heads": 4, "maps": 16}
SMOKE = {
    "config": str(CONFIGS / "sample.yaml"),
    "output_dir": "outputs/smoke",
    "seeds": [42, 43],
    "num_train_epochs": 2,
    "max_train_samples": 128,
    "max_eval_samples": 48,
    "disable_tqdm": True,
    "use_cpu": True,
    "systems": {
        name: {key: value for key, value in SMALL.items() if key in system.config_class.known_fields()}
        for name, system in SYSTEMS.items()
    },
}


@dataclass
class ReproduceArguments:
    """Which runs to make."""

    table: list[int] = field(default_factory=lambda: [3, 4], metadata={"help": "3, 4 or both.", "choices": [3, 4]})
    config: str = field(default=str(CONFIGS / "mvsa_single.yaml"), metadata={"help": "One of train.py's YAML files."})
    seeds: list[int] = field(
        default_factory=list,
        metadata={"help": "The seeds themselves, such as 42 43 44; default: --seed, which is 42."},
    )
    jobs: int = field(default=1, metadata={"help": "Train this many runs at the same time, each in its own process."})
    folds: str | None = field(
        default=None, metadata={"help": "Folds of --splits cheema, such as 1-10 (default) or 1,4."}
    )
    rows: list[str] = field(
        default_factory=list, metadata={"help": "Rows to train, all by default.", "choices": list(ROWS)}
    )
    trials: bool = field(
        default=False, metadata={"help": "Choose from the config's tuning grid for every row and fold."}
    )
    reference: str = field(
        default="full", metadata={"help": "Row that the others are compared with.", "choices": list(ROWS)}
    )
    word_vectors: str | None = field(
        default=None, metadata={"help": "Text encoder of the systems before BERT, written by make_word_vectors.py."}
    )
    smoke: bool = field(default=False, metadata={"help": "Make both tables on the drawn sample, to test the code."})

    def __post_init__(self) -> None:
        if not self.row_names():
            raise InputError(f"--table {' '.join(map(str, self.table))} has none of the rows {', '.join(self.rows)}.")
        self.seeds = list(dict.fromkeys(self.seeds))
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise InputError(f"--seeds must be from 0 to {2**32 - 1}, got {' '.join(map(str, self.seeds))}.")
        if self.jobs < 1:
            raise InputError(f"--jobs must be at least 1, got {self.jobs}.")

    def row_names(self) -> list[str]:
        """Names of the rows to train; a row of both tables comes once."""
        of_tables = [name for name, row in ROWS.items() if set(self.table) & set(row.tables)]
        return [name for name in of_tables if not self.rows or name in self.rows]


@dataclass
class Settings:
    """The config of all rows, or of one row as `for_row` returns it."""

    model: ModelArguments
    data: DataArguments
    training: RecipeArguments
    systems: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]]
    word_vectors: str | None

    def for_row(self, name: str, values: dict[str, Any] | None = None) -> "Settings":
        """Return a copy with the row's own fields and the given values of the tuning grid."""
        row, training, systems = ROWS[name], copy.deepcopy(self.training), copy.deepcopy(self.systems)
        model = replace(self.model, **(row.fields or {**WHOLE, "clip_mode": "none"}))
        if model.modality != "both":
            model.modality_dropout = 0.0
        if not model.use_modality_heads:
            model.modality_loss_weight, model.modality_combination = 1.0, "auto"
        if name in WORD_VECTORS and self.word_vectors:
            model.text_model, model.freeze_text_layers, model.text_subfolder = self.word_vectors, 0, None
        for key, value in (values or {}).items():
            setattr(model if hasattr(model, key) else training, key, value)
            if key in own_fields(row):
                systems.setdefault(row.system, {})[key] = value
        return replace(self, model=model, training=training, systems=systems)

    def grid_of(self, name: str) -> dict[str, list[Any]]:
        """Return the part of the tuning grid that can change a row's scores."""
        row = ROWS[name]
        if row.floor:
            return {}
        read = {entry.name for entry in fields(RecipeArguments)} | own_fields(row) | set(OF_SYSTEMS)
        grid = {key: values for key, values in self.grid.items() if row.system is None or key in read}
        has_heads = (row.fields or {}).get("use_modality_heads", False)
        return {key: values for key, values in grid.items() if has_heads or not key.startswith("modality_")}

    def trials(self, name: str) -> list[dict[str, Any]]:
        """Return all combinations of the values of a row's grid, a single empty one without a grid."""
        grid = self.grid_of(name)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def choices_of_c(self) -> list[float]:
        """Return the values of C that a logistic regression tries: as many as other rows have trials, at least 5."""
        most = max(len(self.trials(name)) for name in ROWS)
        return list(CHOICES) if most <= len(CHOICES) else np.geomspace(CHOICES[0], CHOICES[-1], most).tolist()

    def describe(self, name: str) -> dict[str, Any]:
        """Return everything that a row's scores depend on and that is not a default, except posts, seed and code.

        Keys of the tuning grid are left out of the config, because every run takes their values from the grid.
        """
        row, mine, grid = ROWS[name], self.for_row(name), self.grid_of(name)
        unused = {"cache_features", *grid}
        model = {key: value for key, value in changed(mine.model).items() if key not in unused}
        if row.floor:
            model = {key: model[key] for key in OF_FLOORS if key in model and row.floor != "majority"}
            choices = self.choices_of_c()
            more = {"choices": choices} if row.floor != "majority" and choices != list(CHOICES) else {}
            return {"row": name, "model": model, **more}
        if row.system:
            model = {key: model[key] for key in OF_SYSTEMS if key in model}
        training = {key: value for key, value in changed(mine.training).items() if key not in unused}
        training = {key: value for key, value in training.items() if not key.startswith(IRRELEVANT)}
        sizes = {key: value for key, value in self.systems.get(row.system, {}).items() if key not in grid}
        return {"row": name, "model": model, "training": training, "sizes": sizes, "grid": grid}


def own_fields(row: Row) -> set[str]:
    """Return the config fields that the system of a row adds; none for a row without a system."""
    if row.system is None:
        return set()
    return set(inspect.signature(SYSTEMS[row.system].config_class.__init__).parameters) - {"self", "kwargs"}


def parse(argv: Sequence[str]) -> tuple[ReproduceArguments, Settings]:
    """Read the flags, and the config that they override.

    Raises:
        InputError: If the config or a flag is at fault.
    """
    classes = (ReproduceArguments, ModelArguments, DataArguments, RecipeArguments)
    parser = HfArgumentParser(classes, description="Train the systems of the paper's Tables III and IV.")
    smoke = copy.deepcopy(SMOKE) if "--smoke" in argv else {}
    parser.set_defaults(**{key: value for key, value in smoke.items() if key != "systems"})
    config = Path(parser.parse_known_args(argv)[0].config)
    defaults = read_config(config, parser, OF_TABLES) | {"output_dir": f"outputs/reproduce/{config.stem}"} | smoke
    defaults = yielding(defaults, given_flags(classes, argv))
    grid, systems = read_grid(config, defaults.pop("tuning", {}), parser), defaults.pop("systems", {})
    if unknown := sorted(systems.keys() - SYSTEMS.keys()):
        raise InputError(f"Unknown key {', '.join(unknown)} under systems in {config}. Allowed: {', '.join(SYSTEMS)}.")
    for name, sizes in systems.items():
        with as_input_error(f"{config}: systems", TypeError):
            check_keywords(name, sizes, SYSTEMS[name].config_class.known_fields())
    parser.set_defaults(**defaults)
    own, model, data, training = parse_flags(parser, list(argv))
    if own.trials and not grid:
        raise InputError(f"--trials needs the key tuning in {config}.")
    check(model, training)
    choose_epochs_in_memory(training)
    check_flags(model, training)
    own.seeds = own.seeds or [training.seed]
    return own, Settings(model, data, training, systems, grid if own.trials else {}, own.word_vectors)


def read_grid(config: Path, grid: Any, parser: HfArgumentParser) -> dict[str, list[Any]]:
    """Check the key `tuning` of a config, and convert its values as those of flags.

    Raises:
        InputError: If a key is no flag that may differ from trial to trial, or a value does not suit its flag.
    """
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"{config}: tuning must map each flag to a list of values.")
    of_rows = {"augment", *(key for row in ROWS.values() for key in row.fields or {})}
    allowed = []
    for kind in (ModelArguments, RecipeArguments):
        hints = get_type_hints(kind)
        for entry in fields(kind):
            parts = {hints[entry.name], *get_args(hints[entry.name])}
            is_listed = parts & {int, float, bool} or get_origin(hints[entry.name]) is Literal
            if is_listed and entry.name not in of_rows and not entry.name.startswith(IRRELEVANT):
                allowed.append(entry.name)
    if unknown := sorted(grid.keys() - set(allowed)):
        raise InputError(
            f"Unknown key {', '.join(unknown)} under tuning in {config}. Allowed: the flags of the model and of the "
            "recipe that take numbers, true or false, or one of several words, and that no row sets itself."
        )
    flags = {action.dest: action for action in reversed(parser._actions)}
    converted = {key: [checked(config, flags[key], value) for value in values] for key, values in grid.items()}
    # Equal numbers stay as they are written: 2 epochs, not 2.0.
    return {key: [v if v == c else c for v, c in zip(grid[key], converted[key], strict=True)] for key in grid}


def check(model: ModelArguments, training: RecipeArguments) -> None:
    """Refuse flags that would make rows differ in more than their labels say.

    Raises:
        InputError: The message names the flag.
    """
    if model.model_name_or_path:
        raise InputError("--model_name_or_path is not allowed: every row starts from the same backbones.")
    if model.clip_mode == "none":
        raise InputError("--clip_mode none is a row of Table IV: choose encoder or feature for the full model.")
    frozen = ["freeze_text", "freeze_text_layers", "freeze_vision", *["freeze_clip"] * (model.clip_mode == "encoder")]
    if training.augment_views and not training.augment:
        raise InputError("--augment_views needs --augment.")
    if training.augment and not training.augment_views and any(getattr(model, flag) for flag in frozen):
        raise InputError(
            "--augment needs --augment_views, because outputs of frozen encoders are cached, or encoders that train: "
            f"leave out {', '.join(f'--{flag}' for flag in frozen if getattr(model, flag))}."
        )
    if training.hp_search:
        raise InputError("--hp_search is a flag of train.py: use --trials, which searches for every row.")
    if training.world_size > 1:
        raise InputError(
            "Start reproduce.py with python, without a launcher of several processes: --jobs trains several rows at "
            "the same time."
        )


def choose_epochs_in_memory(training: RecipeArguments) -> None:
    """Evaluate every epoch and write no checkpoint: `KeepBest` keeps the best weights in memory."""
    training.save_strategy = "no"
    training.load_best_model_at_end = True  # early stopping demands it; nothing is loaded without a checkpoint
    if training.eval_strategy == "no":
        training.eval_strategy = "epoch"
    if training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = "accuracy", True


def folds_of(own: ReproduceArguments, data: DataArguments) -> list[int | None]:
    """Return the folds to run; [None] for a protocol without folds.

    Raises:
        InputError: If --folds does not suit --splits or is not a list of folds.
    """
    splits, _, number = str(data.splits).partition(":")
    if splits != "cheema" or data.dataset_name:
        if own.folds:
            raise InputError(f"--folds needs --splits cheema, got --splits {data.splits}.")
        return [None]
    asked, folds = own.folds or number or "1-10", []
    try:
        for part in asked.split(","):
            first, _, last = part.partition("-")
            folds += range(int(first), int(last or first) + 1)
    except ValueError:
        folds = []
    if not folds or not set(folds) <= set(range(1, 11)):
        raise InputError(f"--folds must be such as 1-10 or 1,4, got {asked!r}.")
    return sorted(set(folds))


def changed(arguments: ModelArguments | RecipeArguments) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    plain = type(arguments)()
    values = {entry.name: getattr(arguments, entry.name) for entry in fields(arguments) if entry.init}
    return {key: value for key, value in values.items() if value != getattr(plain, key, MISSING)}
