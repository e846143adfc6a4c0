"""From weights and text to exits, on one kind of machines each: shell scripts to copy and change.

    text → launch.tokenize → launch.tune → launch.calibrate → launch.evaluate → launch.export

The one idea: every step goes on where it was, so each of these may be stopped and given again. What
they need is named at their tops, by variables of the environment.
"""
