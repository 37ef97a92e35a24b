"""What a run needs on disk, looked at before anything slow is imported: data, tokenizer, weights, a folder to write to.

Only what is certainly wrong is refused: what is unknown here is left to the code that reads it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.json_text import read_json, texts
from hybridprune_megatron.config.one_line import COMPILED
from hybridprune_megatron.config.prompt_tokens import RESERVED_TOKENS
from hybridprune_megatron.config.stores import StorePath, located
from hybridprune_megatron.config.weight_files import check_weights

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config

#: What the layer set "te" is made of.
GPU_PACKAGES = COMPILED
_META = ".nv-meta"
_SERVER_SECONDS = 5.0
#: One of these makes a folder a tokenizer's.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def check_files(cfg: Config) -> None:
    """What a training run reads and writes is there and of the right kind.

    Raises:
        ConfigError: the first that is not set, not there, or something else.
    """
    if cfg.data.train is None:
        fix = "set data.train to an Energon dataset folder (hybridprune shards writes one) or a metadataset .yaml"
        raise fail("data.train", None, "a run needs data", fix)
    shards = "hybridprune shards writes a dataset, `make demo` the demo's"
    makers = {
        "data.train": shards,
        "data.validation": f"{shards}; null = no evaluation",
        "data.tokenizer": "set it to a folder with a Hugging Face tokenizer",
        "model.init_checkpoint": "set it to a .safetensors file or a checkpoint folder; null = random weights",
    }
    for key, fix in makers.items():
        group, name = key.split(".")
        path = getattr(getattr(cfg, group), name)
        if group == "data" and path is not None and isinstance(located(path, key), StorePath):
            # What lies in a store is looked at when its descriptions are read.
            continue
        with _readable(key, path):
            if path is not None and not Path(path).exists():
                raise fail(key, path, f"is not there (looked from {Path.cwd()})", fix)
    for key, path in (("data.train", cfg.data.train), ("data.validation", cfg.data.validation)):
        if path is not None and not isinstance(located(path, key), StorePath):
            with _readable(key, path):
                check_dataset(key, Path(path))
    with _readable("data.tokenizer", cfg.data.tokenizer):
        _check_tokenizer(Path(cfg.data.tokenizer))
    with _readable("model.init_checkpoint", cfg.model.init_checkpoint):
        check_weights(cfg.model)
    with _readable("output_dir", cfg.output_dir):
        _check_output(Path(cfg.output_dir))
    _check_loggers(cfg)
    missing = missing_gpu_packages()
    if cfg.model.spec == "te" and missing:
        fix = "install the gpu extra on a GPU machine or set model.spec=torch"
        raise fail("model.spec", "te", f"{', '.join(missing)} not installed", fix)


def _check_loggers(cfg: Config) -> None:
    """Loggers that are asked for are installed; imports none."""
    for package in ("tensorboard", "wandb", "mlflow"):
        key = f"exp_manager.create_{package}_logger"
        if not cfg.exp_manager.get(f"create_{package}_logger"):
            continue
        try:
            # Lightning asks for the distribution, and a folder of that name in the current one is none.
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            fix = f"install it into this environment (pip install {package}) or set {key}=false"
            raise fail(key, "true", f"the package {package} is not installed", fix) from None


def check_tracking_server(cfg: Config) -> None:
    """MLflow's server answers, where a run names one and nothing stands between; MLflow itself tries for minutes.

    Raises:
        ConfigError: it does not.
    """
    uri = str((cfg.exp_manager.get("mlflow_logger_kwargs") or {}).get("tracking_uri"))
    if not cfg.exp_manager.get("create_mlflow_logger") or not uri.startswith(("http://", "https://")):
        return
    key, fix = "exp_manager.mlflow_logger_kwargs.tracking_uri", "start the server, or correct the address"
    try:
        where = urllib.parse.urlsplit(uri)
        scheme, host, port = where.scheme, where.hostname or "", where.port
    except ValueError:
        raise fail(key, uri, "is not an address", fix) from None
    if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.create_connection((host, port or {"http": 80, "https": 443}[scheme]), _SERVER_SECONDS).close()
    except OSError as error:
        raise fail(key, uri, f"cannot be reached ({error.strerror or error})", fix) from None


def missing_gpu_packages() -> list[str]:
    """Packages of the layer set "te" that are not installed; imports none."""
    return [package for package in GPU_PACKAGES if importlib.util.find_spec(package) is None]


@contextmanager
def _readable(key: str, path: str | None) -> Iterator[None]:
    """Names the key where the file system refuses a path (too long, no permission, a loop of links)."""
    try:
        yield
    except OSError as error:
        raise fail(key, path, f"cannot be read ({error.strerror})", "give a path that can") from None


def check_dataset(key: str, path: Path) -> None:
    """A path that is there is a data set's folder, or the file of a blend.

    Raises:
        ConfigError: it is something else.
    """
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise fail(key, str(path), "is a file", "give an Energon data set's folder or a metadataset .yaml")
    if path.is_dir() and not (path / _META).is_dir():
        reason = f"is not an Energon data set: it has no folder {_META}"
        raise fail(key, str(path), reason, "hybridprune shards writes one from videos and conversations")


def _check_tokenizer(folder: Path) -> None:
    key, fix = "data.tokenizer", "set it to a folder with a Hugging Face tokenizer"
    if not folder.is_dir():
        raise fail(key, str(folder), "is a file", fix)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise fail(key, str(folder), f"holds no tokenizer ({', '.join(_TOKENIZER_FILES)})", fix)
    if not (folder / "tokenizer.json").is_file():
        return
    files = [folder / name for name in (*_TOKENIZER_FILES[:2], "added_tokens.json") if (folder / name).is_file()]
    try:
        known = set().union(*(texts(read_json(path)) for path in files))
    except (ValueError, RecursionError) as error:
        raise fail(key, str(folder), f"{error}", fix) from None
    missing = [token for token in RESERVED_TOKENS if token not in known]
    if missing:
        reason = f"the tokenizer has no token {missing[0]}, and prompts are written with {', '.join(RESERVED_TOKENS)}"
        raise fail(key, str(folder), reason, "give the tokenizer that the model was trained with")


def _check_output(folder: Path) -> None:
    key, fix = "output_dir", "give a folder that can be written"
    for path in (folder, folder / "checkpoints", folder / "logs"):
        if path.exists() and not path.is_dir():
            raise fail(key, str(folder), f"{path} is a file", fix)
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise fail(key, str(folder), f"{nearest} is a file", fix)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise fail(key, str(folder), f"{nearest} cannot be written to", fix)
