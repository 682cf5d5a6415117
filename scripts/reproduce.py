"""Train the systems of the paper's Tables III and IV under one protocol, and write the tables.

    python scripts/reproduce.py --smoke      # both tables on the drawn sample in a minute or two; not a result
    python scripts/reproduce.py --config scripts/configs/mvsa_single.yaml --data_dir MVSA_Single --splits clmlf
    python scripts/reproduce.py --table 4 --config ... --data_dir ... --splits cheema --folds 1-10 --seeds 1
    python scripts/reproduce.py --table 3 --config ... --data_dir ... --rows clmlf full --trials

Table IV compares CLIP-CA-CG with its ablations. Table III compares it with the systems of `baselines/` and simple
floors, trained with the same recipe on the same posts. The config is one of `train.py`'s, and every flag of `train.py`
overrides it. `--output_dir` is the folder of the results, `outputs/reproduce/CONFIG` by default. The config may have
two more keys:

    tuning: {learning_rate: [1.0e-4, 3.0e-4], num_train_epochs: [10], dropout: [0.1, 0.3]}
    systems: {clmlf: {hidden_size: 384}}      # config fields of the other systems

With `--trials` every row tries the whole grid with the first seed on the first fold. The values with the best
validation accuracy serve all runs of the row. Trials never see a test post. Without `--trials` the config's values are
used.

Each finished run is one line of `runs.jsonl` and is not trained again, so the same command continues after a kill. A
changed config or changed posts are different runs. A failed run is a line too: the other runs continue, the command
ends with status 1, and the next one tries it again. Each protocol (`--splits`, `--group_duplicates`, `--folds`) is a
section of the tables, and sections of earlier commands stay.

Outputs of frozen backbones come from the feature cache. No checkpoint is written: the trained weights of the best
validation epoch stay in memory and are restored before measuring.
"""

import sys

import datasets
import transformers

from clipcacg.scripts.data.errors import one_sentence, set_up_logging
from clipcacg.scripts.tables.rows import parse
from clipcacg.scripts.tables.runs import reproduce


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with one_sentence(argv):
        tables, failed = reproduce(*parse(argv))
    for path in tables:
        print(path.read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"{failed} runs failed; the same command tries them again.")


if __name__ == "__main__":
    main()
