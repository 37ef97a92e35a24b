"""Makes the tokenizer of the demo, byte-level BPE trained on the text that its prompts hold.

    python scripts/make_demo_tokenizer.py --out assets/demo/tokenizer

Text is split into words, but a frame text, which repeats with every frame, stays in one piece and so takes about three
tokens. Every answer is one token.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_output, whole_folder
from hybridprune_megatron.data.chat_template import CHAT_TEMPLATE
from hybridprune_megatron.data.conversation import END_TOKEN, RESERVED_TOKENS, VIDEO_TOKEN
from hybridprune_megatron.data.prompt import DEFAULT_FRAME_TEXT

# The studies are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from studies.needles.needles import CHOICES, KINDS, NeedlePlan, NeedleTask, plan_samples

COMMAND = "scripts/make_demo_tokenizer.py"
PAD_TOKEN, UNK_TOKEN = "<pad>", "<unk>"
VOCAB_SIZE = 768
#: A frame text, an answer with a dash, a word with the space before it, a run of punctuation, a newline, other space.
WORD_PATTERN = r"Frame \d+ sampled at \d+\.\d+ seconds: | ?\w+(?:-\w+)*| ?[^\s\w]+|\n|[^\S\n]+"


@one_line_errors("make_demo_tokenizer")
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the tokenizer's files; an earlier one is replaced"
    )
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args(argv)
    check_output(args.out, COMMAND)
    tokenizer = train_tokenizer(args.vocab_size)
    with whole_folder(args.out, COMMAND) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{args.out}: {len(tokenizer)} tokens")


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Trains on a fixed synthetic text; the same call gives the same tokenizer."""
    bpe = Tokenizer(models.BPE(unk_token=UNK_TOKEN))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [UNK_TOKEN, PAD_TOKEN, *RESERVED_TOKENS, VIDEO_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=UNK_TOKEN,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def training_text(seed: int = 0) -> Iterator[str]:
    """Pieces as the prompt tokenizes them: frame texts of clips of any rate, questions, answers."""
    rng = random.Random(seed)
    for _ in range(20_000):
        # Index and time are drawn apart, so that they become tokens of their own and other clips read as well.
        seconds = rng.randrange(64) + rng.choice([rng.randrange(4) * 25, rng.randrange(100)]) / 100
        yield DEFAULT_FRAME_TEXT.format(index=min(rng.randint(1, 128), rng.randint(1, 128)), seconds=seconds)
    plans: list[NeedlePlan] = []
    for needles in (1, 2):
        plans += plan_samples(NeedleTask(needles=needles), 2_000, seed, "tokenizer")
    for plan in plans:
        for message in plan.conversation():
            yield message["content"].removeprefix(f"{VIDEO_TOKEN}\n")
    for _ in range(100):
        yield from ("User", "Assistant", "System")
        for kind in KINDS:
            yield from CHOICES[kind]


if __name__ == "__main__":
    main()
