"""Push a checkpoint to the Hub.

    python scripts/push_to_hub.py CHECKPOINT USER/NAME
    python scripts/push_to_hub.py CHECKPOINT USER/NAME --private --revision experiment
    python scripts/push_to_hub.py CHECKPOINT USER/NAME --space

`train.py --push_to_hub --hub_model_id USER/NAME` does the same after training. Log in with `hf auth login` first, or
set HF_TOKEN. Models are public without `--private`; data sets, which `prepare_mvsa.py` pushes, are private by default.
A push is one commit, so an interrupted push leaves the earlier revision as it was. It contains

    README.md                   the model card with the model's name on the Hub; one that you edited stays as it is
    config.json                 with the `auto_map` of all Auto classes
    *_clipcacg.py               the code in `auto_map` and `custom_pipelines`, that of encoders and tokenizers too
    model.safetensors           or model-0000*-of-0000N.safetensors and model.safetensors.index.json
    processor_config.json       both image processors
    tokenizer_config.json       and tokenizer.json, or the vocabulary files of other tokenizers
    clip_tokenizer/             the same two files, if the model reads CLIP inputs
    confusion_matrix.png        if it was drawn
    training_curves.png         if it was drawn
    reliability.png             if it was drawn
    coverage.png                if it was drawn

and no other file of the folder. A file that contains an access token is refused.

`--space` also creates a Space of the same name, with the page of `demo.py` for this model. The Space of a private
model needs a token as its secret HF_TOKEN.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from clipcacg.scripts.data.errors import InputError, add_debug_flag, one_sentence, parse_flags, set_up_logging
from clipcacg.scripts.reporting.hub import push_checkpoint, push_space


@dataclass
class PushArguments:
    """How to push."""

    private: bool = field(default=False, metadata={"help": "Make the repository private; default: public."})
    revision: str | None = field(default=None, metadata={"help": "Branch, created if needed; default: main."})
    space: bool = field(default=False, metadata={"help": "Also create a Space, a page to try the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a tokenizer has of its own."})


def main(argv: list[str] | None = None) -> None:
    set_up_logging()
    parser = HfArgumentParser(PushArguments, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Folder that train.py wrote.")
    parser.add_argument("repo_id", metavar="USER/NAME", help="Name of the model on the Hub.")
    add_debug_flag(parser)
    with one_sentence(argv):
        arguments, names = parse_flags(parser, sys.argv[1:] if argv is None else argv)
        if arguments.space and arguments.revision:
            raise InputError("--space shows the model's main branch: leave out --revision.")
        trust_remote_code = {"trust_remote_code": arguments.trust_remote_code}
        push_checkpoint(names.checkpoint, names.repo_id, arguments.private, arguments.revision, **trust_remote_code)
        if arguments.space:
            push_space(names.repo_id, arguments.private)


if __name__ == "__main__":
    main()
