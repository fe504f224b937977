"""The books, learning and fairness of one account: pure functions over plain state.

Nothing here does I/O, reads a clock or draws a random number. Operations and the time go in, answers and events come
out, and the state is the fold of its events. Start reading at :mod:`paceline.engine.engine`.
"""
