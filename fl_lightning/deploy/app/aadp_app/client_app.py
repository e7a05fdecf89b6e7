"""The messenger at a node: it hands each message to the node service and its answer back.

It needs Flower alone. It sees no record: the service behind the socket decides what is answered.
"""

import socket
import struct

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One question to the node service; what went wrong on the way is said in a word."""
    question = message.content["message"]["bytes"].data
    try:
        answer = _ask(str(context.node_config["socket"]), question)
    except (OSError, KeyError) as error:
        content = RecordDict({"failed": ConfigRecord({"why": type(error).__name__})})
    else:
        block = Array(dtype="uint8", shape=(len(answer),), stype="aadp.message", data=answer)
        content = RecordDict({"message": ArrayRecord({"bytes": block})})
    return Message(content, reply_to=message)


def _ask(path: str, question: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(path)
        stream.sendall(struct.pack("<Q", len(question)) + question)
        with stream.makefile("rb") as answers:
            (size,) = struct.unpack("<Q", _whole(answers.read(8), 8))
            return _whole(answers.read(size), size)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ConnectionError("the node service went away")
    return data
