"""What transformers calls the caches: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on.

Callers may give them under either name. What is passed to transformers' own code, and what outputs carry, has the name
of the version that runs. All that differs between the versions is here and in ``HybridCache.is_linear``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridprune_megatron.export.cache import HybridCache

#: The name that the installed transformers uses.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def given_cache(past_key_values: Any, cache: Any) -> HybridCache | None:
    """The caches, whichever name they were given under; None: none.

    Raises:
        ValueError: two different caches, or caches of another kind.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    found = cache if past_key_values is None else past_key_values
    if found is not None and not isinstance(found, HybridCache):
        raise ValueError(
            f"past_key_values of type {type(found).__name__}: this model makes its own caches; give what an earlier "
            "call returned, or leave it out"
        )
    return found


def cache_argument(cache: HybridCache | None) -> dict[str, Any]:
    """The caches, if there are any, as a keyword argument of transformers' own code."""
    return {} if cache is None else {CACHE_NAME: cache}
