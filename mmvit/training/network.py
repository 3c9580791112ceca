"""The network interface by which processes on several hosts reach one another."""

import ipaddress
import os
import socket
from contextlib import suppress

import psutil
import torch.distributed as dist

INTERFACE = "GLOO_SOCKET_IFNAME"  # what gloo reads


def choose_interface(store: dist.Store, rank: int, world_size: int) -> None:
    """Makes gloo listen on the interface that leads to the other hosts, unless the user has chosen one.

    By default it takes the one that this host's name resolves to, which on many hosts is the loopback.
    """
    own = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address/{rank}", own)
    if os.environ.get(INTERFACE):
        return
    if ipaddress.ip_address(own).is_loopback:  # the others may be on hosts that know this one by its name
        own = address_towards(store.get(f"address/{world_size - 1}").decode())
    for name, addresses in psutil.net_if_addrs().items():
        if own in [each.address for each in addresses]:
            os.environ[INTERFACE] = name


def address_towards(host: str) -> str:
    """This host's own address on the way to another one; the loopback if there is no way."""
    with suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            return probe.getsockname()[0].partition("%")[0]
    return "127.0.0.1"
