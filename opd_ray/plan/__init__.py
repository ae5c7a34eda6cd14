"""What a run will take, before it takes it: memory, bytes on the way, time and money.

    flow      tokens of a step, bytes of a step through the object store and in the broadcast
    memory    bytes of every process, by what they are for
    fit       which process lies on which GPU and node, and whether it fits
    rates     from measured steps: each room's rate, and the split of workers at which no room waits
    probe     a short real run, whose steps are measured
    show      all of it in words

All but ``probe`` is arithmetic; each formula has its source beside it. Gigabytes are 10^9 bytes.
"""
