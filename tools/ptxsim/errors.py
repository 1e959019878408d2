"""What a simulated launch can die of."""


class SimulationError(Exception):
    """The simulated program did something that a GPU would punish, or that this simulator does not know."""


class Unsupported(SimulationError):
    """An instruction, or a form of one, that is not simulated."""


class AccessError(SimulationError):
    """An access outside every tensor of the launch or the program's shared memory, or a misaligned one."""


class DivergenceError(SimulationError):
    """An instruction that a whole warp has to execute together, executed by a part of one."""


class Deadlock(SimulationError):
    """Threads wait at a barrier that others never reach."""


class LimitExceeded(SimulationError):
    """A warp executed more instructions than it was allowed to."""
