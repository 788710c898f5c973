"""Settings of services that a run's metrics are sent to, beside its own log and TensorBoard."""

from __future__ import annotations

from common.config.base import Section


class WandbConfig(Section):
    """Weights & Biases; its own environment (``WANDB_API_KEY``, ``WANDB_MODE``) counts."""

    project: str
    """Project."""
    entity: str | None = None
    """Team or user; null is the account's default."""


class MlflowConfig(Section):
    """MLflow; its own environment (``MLFLOW_TRACKING_TOKEN``) counts."""

    experiment: str
    """Experiment, made where it is not there."""
    uri: str | None = None
    """Tracking server; null is ``MLFLOW_TRACKING_URI``."""


class TrackioConfig(Section):
    """Trackio, which keeps runs on this machine (``TRACKIO_DIR``); `trackio show` shows them."""

    project: str
    """Project."""


class TrackersConfig(Section):
    """Services that a run's metrics are sent to; each needs its own package."""

    wandb: WandbConfig | None = None
    """Weights & Biases (``pip install wandb``)."""
    mlflow: MlflowConfig | None = None
    """MLflow (``pip install mlflow-skinny``)."""
    trackio: TrackioConfig | None = None
    """Trackio (``pip install trackio``)."""
