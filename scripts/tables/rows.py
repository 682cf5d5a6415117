"""What the tables compare: their rows, the flags, and the config of each row."""

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.baselines.logistic_regression import LABELS, MAJORITY_LABEL, MODALITIES
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.tables.rendering import Row
from clipcacg.scripts.training.arguments import CONFIGS, ModelArguments, RecipeArguments

RESULTS = Path(__file__).parents[1] / "results"
WORD_VECTORS = ("cnn_multi", "dnn_lr", "co_memory", "mvan")  # the systems before BERT
WHOLE = {"modality": "both", "use_cross_attention": True, "use_gating": True}
PAPER = {"mvsa_single": (75.38, 75.21), "mvsa_multiple": (73.95, 73.83)}

# In the order of the tables, floors first and ours last.
ROWS: dict[str, Row] = {"majority": Row(MAJORITY_LABEL, (3,), floor="majority")}
ROWS |= {f"regression_{modality}": Row(LABELS[modality], (3,), floor=modality) for modality in MODALITIES}
ROWS |= {
    name: Row(
        system.label, (3,), system=name, fidelity=system.fidelity if system.published else "",
        substitutions=system.substitutions, published=system.published,
    )
    for name, system in sorted(SYSTEMS.items(), key=lambda item: bool(item[1].published))
}  # fmt: skip
ROWS |= {
    "image_only": Row("V only", (4,), {**WHOLE, "modality": "image"}),
    "text_only": Row("T only", (4,), {**WHOLE, "modality": "text"}),
    "no_clip": Row("w/o Clip", (4,), {**WHOLE, "clip_mode": "none"}),
    "no_cross_attention": Row("w/o CA", (4,), {**WHOLE, "use_cross_attention": False}),
    "no_gating": Row("w/o CG", (4,), {**WHOLE, "use_gating": False}),
    "full": Row("CLIP-CA-CG", (3, 4), WHOLE, published=PAPER),
}

# What a grid may hold, and what of a config can change the numbers of a floor, or of another system.
TUNED = {"learning_rate": RecipeArguments, "num_train_epochs": RecipeArguments, "dropout": ModelArguments}
OF_FLOORS = ("text_model", "vision_model", "max_length", "cache_dtype")
OF_SYSTEMS = (*OF_FLOORS, "dropout", "freeze_text", "freeze_text_layers", "freeze_vision", "class_weights")
# And what of a recipe cannot change any.
IRRELEVANT = (
    "output_dir", "overwrite_", "seed", "report_to", "disable_tqdm", "use_cpu", "resume_from", "log", "save_", "hub_",
    "push_", "dataloader_", "load_best",
)  # fmt: skip

SMOKE = {
    "config": str(CONFIGS / "sample.yaml"),
    "output_dir": "outputs/smoke",
    "seeds": 2,
    "num_train_epochs": 2,
    "max_train_samples": 128,
    "max_eval_samples": 48,
    "disable_tqdm": True,
    "use_cpu": True,
    "systems": {name: {"hidden_size": 48, "num_attention_heads": 4, "maps": 16} for name in SYSTEMS},
}


@dataclass
class ReproduceArguments:
    """Which runs."""

    table: list[int] = field(default_factory=lambda: [3, 4], metadata={"help": "3, 4 or both."})
    config: str = field(default=str(CONFIGS / "mvsa_single.yaml"), metadata={"help": "One of train.py's YAML files."})
    seeds: int = field(default=3, metadata={"help": "Runs of each row and fold; their seeds count up from --seed."})
    folds: str | None = field(default=None, metadata={"help": "For --splits cheema: which, as 1-10 (default) or 1,4."})
    rows: list[str] = field(default_factory=list, metadata={"help": f"Some of {', '.join(ROWS)}; default: all."})
    trials: bool = field(default=False, metadata={"help": "Choose among the config's tuning grid, for every row."})
    word_vectors: str | None = field(
        default=None, metadata={"help": "Text encoder of the systems before BERT, as make_word_vectors.py writes it."}
    )
    smoke: bool = field(default=False, metadata={"help": "Both tables on the drawn sample, as a test of the code."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.rows if name not in ROWS]
        if unknown:
            raise ValueError(f"--rows has no {', '.join(unknown)}; there are {', '.join(ROWS)}.")
        if not self.row_names():
            raise ValueError(f"--table {' '.join(map(str, self.table))} has none of these rows; tables are 3 and 4.")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {self.seeds}.")

    def row_names(self) -> list[str]:
        """The rows to train; one that stands in both tables comes once."""
        of_tables = [name for name, row in ROWS.items() if set(self.table) & set(row.tables)]
        return [name for name in of_tables if not self.rows or name in self.rows]


@dataclass
class Settings:
    """The config of all rows, or, as `for_row` returns it, of one."""

    model: ModelArguments
    data: DataArguments
    training: RecipeArguments
    systems: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]]
    word_vectors: str | None

    def for_row(self, name: str, values: dict[str, Any] | None = None) -> "Settings":
        """These settings with a row's own fields, and with the values that a trial tries, or that were chosen."""
        row, training = ROWS[name], copy.deepcopy(self.training)
        model = replace(self.model, **(row.fields or {**WHOLE, "clip_mode": "none"}))
        if name in WORD_VECTORS and self.word_vectors:
            model.text_model, model.freeze_text_layers = self.word_vectors, 0
        for key, value in (values or {}).items():
            setattr(model if TUNED[key] is ModelArguments else training, key, value)
        return replace(self, model=model, training=training)

    def describe(self, name: str) -> dict[str, Any]:
        """All that a row's numbers depend on, except for posts, seed and code, as far as it is not the default.

        What the grid holds stands in place of the config's own value, which no run of the row uses then.
        """
        row, mine = ROWS[name], self.for_row(name)
        unused = {"cache_features", *self.grid}
        model = {key: value for key, value in changed(mine.model).items() if key not in unused}
        if row.floor:
            model = {key: model[key] for key in OF_FLOORS if key in model and row.floor != "majority"}
            return {"row": name, "model": model}
        if row.system:
            model = {key: model[key] for key in OF_SYSTEMS if key in model}
        training = {key: value for key, value in changed(mine.training).items() if key not in unused}
        training = {key: value for key, value in training.items() if not key.startswith(IRRELEVANT)}
        sizes = self.systems.get(row.system, {})
        return {"row": name, "model": model, "training": training, "sizes": sizes, "grid": self.grid}

    def trials(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values; without a grid there is none."""
        combinations = itertools.product(*self.grid.values()) if self.grid else ()
        return [dict(zip(self.grid, values, strict=True)) for values in combinations]


def parse(argv: Sequence[str]) -> tuple[ReproduceArguments, Settings]:
    """Read the flags, and the config whose values they override.

    Raises:
        ValueError: If the config, or a flag, asks for something that is not there or cannot be compared.
    """
    classes = (ReproduceArguments, ModelArguments, DataArguments, RecipeArguments)
    parser = HfArgumentParser(classes, description="Train what the paper's Tables III and IV compare.")
    smoke = copy.deepcopy(SMOKE) if "--smoke" in argv else {}
    parser.set_defaults(**{key: value for key, value in smoke.items() if key != "systems"})
    config = Path(parser.parse_known_args(argv)[0].config)
    defaults = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    defaults |= {"output_dir": str(RESULTS / config.stem)} | smoke
    grid, systems = defaults.pop("tuning", {}), defaults.pop("systems", {})
    unknown = defaults.keys() - {action.dest for action in parser._actions}
    unknown |= (grid.keys() - TUNED.keys()) | (systems.keys() - SYSTEMS.keys())
    if unknown:
        raise ValueError(f"{config}: nothing is called {', '.join(sorted(unknown))}.")
    parser.set_defaults(**defaults)
    own, model, data, training = parser.parse_args_into_dataclasses(list(argv))
    if own.trials and not grid:
        raise ValueError(f"--trials chooses among a grid, and {config} has none: give it a key tuning.")
    check(model, training)
    choose_epochs_in_memory(training)
    return own, Settings(model, data, training, systems, grid if own.trials else {}, own.word_vectors)


def check(model: ModelArguments, training: RecipeArguments) -> None:
    """Refuse what would make rows differ by more than they say.

    Raises:
        ValueError: The message says which flag.
    """
    if model.model_name_or_path:
        raise ValueError("--model_name_or_path is for train.py: here every row starts from the same backbones.")
    if model.clip_mode == "none":
        raise ValueError("--clip_mode none is a row of Table IV; choose encoder or feature for the full model.")
    if training.augment:
        raise ValueError("--augment cannot be used here: the outputs of frozen backbones are always cached.")
    if training.world_size > 1:
        raise ValueError("This script is for one process: start it once a GPU, with --rows and an --output_dir each.")


def choose_epochs_in_memory(training: RecipeArguments) -> None:
    """Evaluate, and name the score to choose by, but write no checkpoint: `reproduce.KeepBest` keeps the weights."""
    training.save_strategy = "no"
    training.load_best_model_at_end = True  # or early stopping warns; without a checkpoint it loads nothing
    if training.eval_strategy == "no":
        training.eval_strategy = "epoch"
    training.metric_for_best_model = training.metric_for_best_model or "accuracy"
    training.greater_is_better = not training.metric_for_best_model.endswith("loss")


def folds_of(own: ReproduceArguments, data: DataArguments) -> list[int | None]:
    """Which folds to go through; None alone for a protocol that has none.

    Raises:
        ValueError: For folds of another split, or folds that there are not.
    """
    splits, _, number = str(data.splits).partition(":")
    if splits != "cheema" or data.dataset_name:
        if own.folds:
            raise ValueError(f"--folds are those of --splits cheema, not of {data.splits}.")
        return [None]
    asked, folds = own.folds or number or "1-10", []
    try:
        for part in asked.split(","):
            first, _, last = part.partition("-")
            folds += range(int(first), int(last or first) + 1)
    except ValueError:
        folds = []
    if not folds or not set(folds) <= set(range(1, 11)):
        raise ValueError(f"--folds must be such as 1-10 or 1,4, not {asked!r}.")
    return sorted(set(folds))


def changed(arguments: ModelArguments | RecipeArguments) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    plain = type(arguments)()
    values = {entry.name: getattr(arguments, entry.name) for entry in fields(arguments) if entry.init}
    return {key: value for key, value in values.items() if value != getattr(plain, key, MISSING)}


def short_hash(value: Any) -> str:
    """The same for equal values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
