"""The floor: a bare grpc.aio server in a process of its own, raw bytes in, bytes of a given length out.

A path "/echo/N" answers with N bytes; "/echo/same" with what came; "/stream/N" is a stream that answers each message
with N bytes, "/stream/same" with what came. Prints its port.
"""

import asyncio
import itertools
import sys

import grpc

from pullback_wire.malloc import pin_malloc


class Echo(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self.answers: dict[int, bytes] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        kind, _, length = details.method.rpartition("/")
        if kind == "/stream":
            size = -1 if length == "same" else int(length)

            async def each(_: object, context: grpc.aio.ServicerContext) -> None:
                fixed_answer = bytes(max(size, 0))
                while (data := await context.read()) is not grpc.aio.EOF:
                    await context.write(data if size < 0 else fixed_answer)

            return grpc.stream_stream_rpc_method_handler(each)
        if length == "same":

            async def same(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
                return data

            return grpc.unary_unary_rpc_method_handler(same)
        answer = self.answers.setdefault(int(length), bytes(int(length)))

        async def fixed(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return answer

        return grpc.unary_unary_rpc_method_handler(fixed)


async def main() -> None:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers((Echo(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    # Ends with its parent: the pipe on standard input closes.
    for _ in itertools.count():
        if not await asyncio.to_thread(sys.stdin.read, 1):
            break
    await server.stop(0)


if __name__ == "__main__":
    pin_malloc()
    asyncio.run(main())
