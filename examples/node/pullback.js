// The wire in JavaScript: services from the .proto files, typed arrays as tensors, errors with their reasons.
"use strict";
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const here = [path.join(__dirname, "../../protos"), __dirname];
const files = ["gradient_service", "model_service", "session_service"].map((name) => `pullback_wire/v1/${name}.proto`);
// Names as the .proto files have them, and zeros where nothing was sent (payload 0 is not written).
const options = { includeDirs: here, keepCase: true, defaults: true, oneofs: true, longs: Number, enums: String };
const loaded = loader.loadSync([...files, "details.proto"], options);
const { pullback, google } = grpc.loadPackageDefinition(loaded);
const DTYPES = { DTYPE_FLOAT32: Float32Array, DTYPE_FLOAT64: Float64Array, DTYPE_INT64: BigInt64Array };

// A tensor's description; its bytes go to `payloads`. JavaScript's typed arrays are little-endian wherever Node runs.
function tensor(payloads, name, data, shape = [data.length]) {
  const dtype = Object.keys(DTYPES).find((key) => data instanceof DTYPES[key]);
  payloads.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  return { name, dtype, shape, payload: payloads.length - 1 };
}

// The values of a tensor in an answer, copied to where a typed array may begin.
function values(answer, tensor) {
  const bytes = new Uint8Array(answer.payloads[tensor.payload]);
  return new DTYPES[tensor.dtype](bytes.buffer);
}

// ErrorInfo of an error's details.
function errorInfo(error) {
  const [raw] = error.metadata.get("grpc-status-details-bin");
  const any = raw && decode("google.rpc.Status", raw).details.find((one) => one.type_url.endsWith("/google.rpc.ErrorInfo"));
  return any && decode("google.rpc.ErrorInfo", any.value);
}
const decode = (name, bytes) => loaded[name].deserialize(bytes);

// A unary method as a promise.
const ask = (client, method, request) =>
  new Promise((resolve, reject) => client[method](request, (error, answer) => (error ? reject(error) : resolve(answer))));

module.exports = { grpc, services: pullback.v1, tensor, values, errorInfo, ask };
