"""The configuration of a deployment: what it needs besides its recipe. Torch-free."""

import re

from osler.config.schema import NonNegativeInt, PositiveInt, config


@config
class DeployConfig:
    """The machines of a run, and the volume, image and secrets that they use."""

    name: str | None = None  # name of the run and of everything that is made for it; null: the recipe's name
    machines: PositiveInt = 1  # machines that train together
    gpus: NonNegativeInt = 1  # GPUs of each machine; 0: train on CPU cores
    processes: PositiveInt | None = None  # processes of each machine; null: one for each GPU
    gpu_name: str = "H100"  # the GPU to rent (skypilot, dstack)
    cpus: PositiveInt = 8  # CPU cores of each machine
    memory_gb: PositiveInt = 64  # memory of each machine, shared memory included
    shm_gb: PositiveInt = 8  # shared memory, through which NCCL and gloo talk within a machine
    disk_gb: PositiveInt = 200  # size of the volume
    volume: str = "osler"  # holds runs and data, and outlives the machines: a PersistentVolumeClaim, a bucket or a volume
    image: str = "osler:cuda"  # the image that the Dockerfile builds
    namespace: str = "default"  # namespace of Kubernetes
    secret: str = "osler-tokens"  # secret of Kubernetes that holds the tokens
    tokens: tuple[str, ...] = ()  # names of environment variables with tokens, such as HF_TOKEN; never their values
    grace_seconds: PositiveInt = 120  # how long a run has to finish its step and save when it is asked to stop
    max_failures: NonNegativeInt = 3  # crashes after which Kubernetes gives up; an eviction is no crash

    def __post_init__(self) -> None:
        if not all(re.fullmatch("[A-Z][A-Z0-9_]*", token) for token in self.tokens):  # the message must not repeat it
            raise ValueError("a token is given by the name of its variable, such as HF_TOKEN, never by its value")

    @property
    def processes_per_machine(self) -> int:
        """The processes that one machine runs."""
        return self.processes or max(self.gpus, 1)
