"""Mutation: what the tests would not notice. `make mutate`; mutation.md has the results.

    python -m tools.mutation reference --every 4    # every fourth mutant of a part; `--help` has the parts

    python_mutants, cpp_mutants    source -> mutants, by rules
    judges                         what a mutant has to survive
    cpp_build                      the extension with one file changed
    jobs, barriers                 the mutants of a part, and how each is judged
    results, page                  what is kept, and mutation.md

Prints a line for each mutant. What was found stays in build/mutation, so that a run goes on where it was stopped.
"""
