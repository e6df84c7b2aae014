"""The road between the front and its workers: frames on a socket, payloads in shared memory. No torch, no grpc."""
