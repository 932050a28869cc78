"""Where and how large: what a deployment needs beside its recipe. Torch-free."""

from osler.config.schema import NonNegativeInt, PositiveInt, config


@config
class DeployConfig:
    """The machines of a run, and what they are to find there."""

    name: str | None = None  # of the run, and of everything that is made for it; null: that of the recipe
    machines: PositiveInt = 1  # that train together
    gpus: NonNegativeInt = 1  # of each machine; 0: train on CPU cores
    processes: PositiveInt | None = None  # of each machine; null: one for each GPU
    gpu_name: str = "H100"  # what to rent (skypilot, dstack)
    cpus: PositiveInt = 8  # of each machine
    memory_gb: PositiveInt = 64  # of each machine, shared memory included
    shm_gb: PositiveInt = 8  # shared memory, through which NCCL and gloo talk within a machine
    disk_gb: PositiveInt = 200  # of the volume
    volume: str = "osler"  # that holds runs and data, and outlives what trains: a PersistentVolumeClaim, a bucket, a volume
    image: str = "osler:cuda"  # what the Dockerfile builds
    namespace: str = "default"  # of Kubernetes
    secret: str = "osler-tokens"  # of Kubernetes, which holds the tokens
    tokens: tuple[str, ...] = ()  # names of environment variables with tokens, such as HF_TOKEN; never their values
    grace_seconds: PositiveInt = 120  # that a run has to finish its step and save when it is asked to stop
    max_failures: NonNegativeInt = 3  # crashes after which Kubernetes gives up; an eviction is none

    @property
    def processes_per_machine(self) -> int:
        """The processes that one machine runs."""
        return self.processes or max(self.gpus, 1)
