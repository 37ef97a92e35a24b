"""What every world needs, done once in the forkserver that its ranks are forked from."""

from tests.models.tiny import tiny_config

# Hydra's first configuration takes three times as long as any other.
tiny_config()
