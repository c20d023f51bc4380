"""The processes of one run: how they find each other, how they end together, and how the death of one is noticed.

launchers    who started this process, and with how many others
rollcall     every process connects to process 0 before JAX is started; missing ones are named
lifeline     those connections stay open: a process that dies is known to all others within a second
membership   what a run calls: join, meet, leave
"""

from diffusion.training.processes.membership import join, leave, meet, peer_died

__all__ = ["join", "leave", "meet", "peer_died"]
