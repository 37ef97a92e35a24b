"""``hybridprune benchmark`` without the console command; ``--help`` says what it takes."""

import sys

from hybridprune_megatron.commands.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
