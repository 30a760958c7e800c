"""What an offline run of Weights & Biases has left on disk."""


def wandb_records(file):
    """The records of a `.wandb` file: LevelDB's log format (crc 4, length 2, type 1, data) in 32 KiB blocks after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    raw, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
