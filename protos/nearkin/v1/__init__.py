"""The nearkin wire protocol, version 1: messages (`neighbours_pb2`) and stubs (`neighbours_pb2_grpc`)."""
