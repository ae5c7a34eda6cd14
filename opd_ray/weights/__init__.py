"""The student's weights on their way from the learner to those that sample with them or follow them.

    gathering     the learner's weights, whole, whatever ZeRO made of them
    transfer      one process's part in a broadcast: what is sent, in which order, and what is refused
    adapters      what low-rank adapters, where these alone are sent, amount to
    meeting       how the members of a group find each other, and prove that they belong to it
    beside        what receiving beside an engine's steps takes
    wires         what the bytes travel by: gloo between CPU processes, NCCL between GPUs
    vllm_worker   a broadcast into a running vLLM engine
    delivery      the driver's side: who takes part, and what becomes of a broadcast that fails

The driver starts all sides at once; none knows the others' actors.
"""

BUCKET_BYTES = 32 * 2**20
"""Parameters are gathered and sent in buckets of at most this size, two at a time: large enough for a network's full
speed, and little memory."""
