"""The launcher: starts, watches and stops the parts of a stack on one machine.

It runs them as ordinary processes and imports neither the gateway nor torch nor vLLM.
"""
