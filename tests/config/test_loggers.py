"""Loggers that cannot work are one line within seconds: a package that is missing, a server that is not there."""

from __future__ import annotations

import importlib.metadata
import socket
import urllib.request

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import Config, load_config
from hybridprune_megatron.config.files import _check_loggers, check_tracking_server


def _mlflow(uri: str) -> Config:
    kwargs = "+exp_manager.mlflow_logger_kwargs="
    return load_config(["exp_manager.create_mlflow_logger=true", f"{kwargs}{{tracking_uri: '{uri}'}}"])


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = ["+exp_manager.wandb_logger_kwargs.project=mine"] if package == "wandb" else []
    cfg = load_config([f"exp_manager.create_{package}_logger=true", *project])
    installed = importlib.metadata.distribution("torch")

    def found(name: str) -> importlib.metadata.Distribution:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "distribution", found)
    with pytest.raises(ConfigError) as refused:
        _check_loggers(cfg)
    key = f"exp_manager.create_{package}_logger"
    reason = f"{key}=true: the package {package} is not installed"
    fix = f"install it into this environment (pip install {package}) or set {key}=false"
    assert str(refused.value) == f"{reason}; {fix}"
    # Asked for and there, or not asked for.
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    _check_loggers(cfg)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}/tracking"
        check_tracking_server(_mlflow(uri))
    key = "exp_manager.mlflow_logger_kwargs.tracking_uri"
    with pytest.raises(ConfigError, match=f"{key}={uri}: cannot be reached .Connection refused.; start the server"):
        check_tracking_server(_mlflow(uri))
    with pytest.raises(ConfigError, match="is not an address"):
        check_tracking_server(_mlflow("http://127.0.0.1:port"))
    # What is behind a proxy, or no server, is left to MLflow.
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"http": "http://127.0.0.1:9"})
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: False)
    check_tracking_server(_mlflow(uri))
    check_tracking_server(_mlflow("sqlite:///runs.db"))
