"""``hybridprune plan`` without the console command; ``--help`` says what it takes."""

import sys

from hybridprune_megatron.commands.door import run
from hybridprune_megatron.commands.plan import main as main

if __name__ == "__main__":
    run(["plan", *sys.argv[1:]])
