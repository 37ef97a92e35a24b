"""What a model costs, counted from its configuration: operations, bytes, memory; and the budget that reaches a target.

Plain python, so that ``hybridprune plan`` answers within seconds; see ``docs/analysis.md``.
"""
