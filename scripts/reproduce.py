"""Train the systems of the paper's Tables III and IV under one protocol, and write the tables.

    python scripts/reproduce.py --smoke      # both tables on the drawn sample in a minute or two; not a result
    python scripts/reproduce.py --config scripts/configs/mvsa_single_offline.yaml --data_dir MVSA_Single \\
        --splits cheema --folds 1-10 --group_duplicates --trials --jobs 2
    python scripts/reproduce.py --table 4 --config ... --data_dir ... --splits clmlf --seeds 42 43 44
    python scripts/reproduce.py --table 3 --config ... --data_dir ... --rows clmlf full --trials

Table IV compares CLIP-CA-CG with its ablations. Table III compares it with the systems of `baselines/` and simple
baselines, trained with the same recipe on the same posts. The config is one of `train.py`'s, and every flag of
`train.py` overrides it. `--output_dir` is the folder of the results, `outputs/reproduce/CONFIG` by default. The config
may have two more keys:

    tuning: {learning_rate: [1.0e-4, 3.0e-4], num_train_epochs: [10], hidden_size: [128, 384]}
    systems: {clmlf: {num_attention_heads: 8}}      # config fields of the other systems

`tuning` takes any flag of the model and the recipe that is a number, true or false, or one of several words, unless a
row sets it itself. With `--trials` every row tries the whole grid on every fold, with the first seed. The values with
the best accuracy on that fold's validation posts serve that row and fold. Test posts choose nothing. A row has fewer
trials if its system has no such field, and the table shows the number. A logistic regression tries as many values of
C as the other rows have trials, and at least five. Without `--trials` the config's values are used.

The folds of `--splits cheema` are scored together, so that every post is a test post once. The tables show 95%
intervals, and compare every row with CLIP-CA-CG or with `--reference`.

Before it starts, the command prints the number of runs; after each run, an estimate of the time left. Each finished
run is one line of `runs.jsonl` and is not trained again, so the same command continues after a kill. A changed config
or changed posts are different runs. A failed run is a line too: the other runs continue, the command ends with status
1, and the next one tries it again. Each protocol (`--splits`, `--group_duplicates`, ...) is a section of the tables,
and sections of earlier commands stay. `--jobs N` trains N runs at the same time.

Outputs of frozen backbones come from the feature cache. No checkpoint is written: the trained weights of the best
validation epoch stay in memory and are restored before measuring.
"""

import sys

import datasets
import transformers

from clipcacg.scripts.data.errors import one_sentence, set_up_logging
from clipcacg.scripts.tables.plan import reproduce
from clipcacg.scripts.tables.rows import parse


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with one_sentence(argv):
        try:
            tables, failed = reproduce(*parse(argv))
        except KeyboardInterrupt:
            sys.exit("Interrupted. Finished runs are kept, and the same command continues.")
    for path in tables:
        print(f"{path}:\n\n{path.read_text(encoding='utf-8')}")
    if failed:
        sys.exit(f"{failed} runs failed; the same command tries them again.")


if __name__ == "__main__":
    main()
