// One backward on a graph that the server holds: put, call and grad are sent together, and answered in order.
"use strict";
const { tensor, values } = require("./pullback.js");

module.exports = async function session(service, model, input, x, { v, shape, gradient }) {
  const stream = service.Session();
  let op = 0;
  const payloads = [];
  const send = (frame, payloads = []) => stream.write({ op: ++op, payloads, ...frame });
  send({ open: { models: [{ name: model }] } });
  // Handles are numbers that the client chooses: 1 is x, 2 is y = model(x), 3 is the gradient.
  send({ put: { tensors: [tensor(payloads, "", x)], handles: [1], requires_grad: [true] } }, payloads);
  send({ call: { function: { model }, inputs: [{ name: input, handle: 1 }], handles: [2] } });
  const more = [];
  const cotangent = { tensor: tensor(more, "", v, shape) };
  send({ grad: { outputs: [2], grad_outputs: [cotangent], inputs: [1], handles: [3], fetch_below: 1 << 20 } }, more);
  stream.write({ close: {} });

  for await (const answer of stream) {
    if (answer.status && answer.status.code) throw new Error(`op ${answer.op}: ${answer.status.message}`);
    if (answer.frame === "opened") console.log(`session ${answer.opened.session_id} on ${answer.opened.device}`);
    if (answer.op === op) {
      const found = values(answer, answer.result.handles[0].tensor);
      if (found.some((one, i) => Math.abs(one - gradient[i]) > 1e-12)) throw new Error(`${found}, not ${gradient}`);
      console.log("session: the same gradient");
    }
  }
};
