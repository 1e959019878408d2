"""A model of the Triton kernels' time on GPUs that nobody here has: gpu-model.md.

    machines      what a GPU can do: every parameter of the model, with its source
    operations    PTX instructions by the unit that they keep busy
    replay        executed instructions of one program through an in-order scoreboard: cycles
    counting      compiles a kernel, runs it in tools/ptxsim, counts and replays a step; kept in counts.json
    model         sizes -> time per step, what bounds it, and other schedules and implementations beside it
    page          the tables

`python -m tools.gpu_model` (`make model`) counts what is missing and writes the page. Nothing in it was measured.
"""
