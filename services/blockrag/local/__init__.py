"""The whole system on this machine: started, found again and stopped, touching no process of anybody else."""

from blockrag.local.local_system import LocalSystem

__all__ = ["LocalSystem"]
