"""What is wrong between nodes: clocks, ports, and the all-reduce. Pure."""

from cat_ray.doctor.facts import Facts, Link
from cat_ray.doctor.finding import Finding, Verdict
from cat_ray.doctor.wording import GIGA, NAMES_SHOWN, counted, in_time

# A notice of preemption is an absolute time, 30 s ahead on Google Cloud and Azure: a clock that
# is a second off takes a part of it, one that is ten off all that a save needs.
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 10.0


def clocks(facts: Facts) -> Finding:
    """Whether the nodes' clocks agree."""
    clocks = [(node.name, node.clock) for node in facts.nodes if node.clock is not None]
    if not clocks:
        return Finding("clocks", "warn", "not compared: no node answered")
    slow, fast = (choose(clocks, key=lambda each: each[1].ahead_seconds) for choose in (min, max))
    apart = fast[1].ahead_seconds - slow[1].ahead_seconds
    doubt = (fast[1].round_trip_seconds + slow[1].round_trip_seconds) / 2
    told = f"{in_time(apart)} apart, known to {in_time(doubt)}"
    # What the round trip leaves open is nobody's fault.
    sure = apart - doubt
    if sure < CLOCK_WARN_SECONDS:
        return Finding("clocks", "pass", told)
    told = f"{fast[0]} is {in_time(apart)} ahead of {slow[0]}, known to {in_time(doubt)}"
    verdict: Verdict = "fail" if sure >= CLOCK_FAIL_SECONDS else "warn"
    advice = "run chrony on all nodes: notices of preemption are absolute times, S3 checks them too"
    return Finding("clocks", verdict, told, advice)


def ports(facts: Facts) -> Finding:
    """Whether each node reaches each other one."""
    if not facts.links:
        return Finding("ports", "warn", "not tried: no two nodes answered")
    blocked = [link for link in facts.links if link.blocked]
    if blocked:
        told = "; ".join(_told(link) for link in blocked[:NAMES_SHOWN])
        more = len(blocked) - NAMES_SHOWN
        advice = (
            "open TCP between all nodes on the whole range (security group, firewall, "
            "NetworkPolicy): gloo, NCCL and torch take any free port of it"
        )
        return Finding("ports", "fail", told + f"; {more} more" * (more > 0), advice)
    pairs = counted(len(facts.links), "connection")
    tried = [port for link in facts.links for port in link.ports]
    return Finding("ports", "pass", f"{pairs} on ports {min(tried)} to {max(tried)}")


def _told(link: Link) -> str:
    reason = next(iter(link.blocked.values()))
    ports = ", ".join(str(port) for port in link.blocked)
    return f"{link.source} to {link.target}: port {ports} ({reason})"


def all_reduce(facts: Facts) -> Finding:
    """Whether processes on the nodes can add up gradients, and how fast."""
    found = facts.reduction
    if found is None:
        return Finding("all-reduce", "warn", "not tried: no node answered")
    on = f"{found.backend}, {counted(len(found.members), 'process', 'processes')} on "
    on += counted(len(set(found.members)), "node")
    if found.failures:
        told = "; ".join(f"{node}: {why}" for node, why in found.failures[:NAMES_SHOWN])
        name = "NCCL_SOCKET_IFNAME" if found.backend == "nccl" else "GLOO_SOCKET_IFNAME"
        advice = (
            f"see ports above; else set {name} on all nodes to the interface that has the node's "
            "address (a host name that means 127.0.0.1 is a frequent cause)"
        )
        if found.backend == "nccl":
            advice += ", and NCCL_DEBUG=INFO to see more"
        return Finding("all-reduce", "fail", f"{on}: {told}", advice)
    if found.bandwidth is None or found.latency_seconds is None:
        return Finding("all-reduce", "pass", f"{on}: it works; nothing to measure")
    figures = f"{found.bandwidth / GIGA:.3g} GB/s, latency {in_time(found.latency_seconds)}"
    return Finding("all-reduce", "pass", f"{on}: {figures}")
