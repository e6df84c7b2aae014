// A VJP of a hosted model from Node.js, held against a central difference; an error's reason; a backward in a session.
//   node client.js localhost:8470 [MODEL]    a model of one float64 vector and one real output; else the first such
"use strict";
const { grpc, services, tensor, values, errorInfo, ask } = require("./pullback.js");

async function main(target = "localhost:8470", wanted) {
  const open = (service) => new services[service](target, grpc.credentials.createInsecure());
  const [models, gradients] = [open("ModelService"), open("GradientService")];
  const { models: listed } = await ask(models, "ListModels", {});
  console.log("models:", listed.map((model) => model.name).join(", "));
  const fits = ({ inputs, outputs }) =>
    [inputs, outputs].every((specs) => specs.length === 1 && specs[0].dtype === "DTYPE_FLOAT64") && inputs[0].shape.length === 1;
  const model = listed.find((one) => (wanted ? one.name === wanted : fits(one)));
  if (!model) throw new Error(`no model of one float64 vector and one output among ${listed.length}`);
  const [{ name, shape: [dim] }] = model.inputs;

  const x = Float64Array.from({ length: dim.size || 4 }, (_, i) => 0.3 + 0.2 * i);
  const request = (data, more = {}) => {
    const payloads = [];
    return { function: { model: model.name }, inputs: [tensor(payloads, name, data)], payloads, ...more };
  };
  const f = async (data) => {
    const answer = await ask(gradients, "Evaluate", request(data));
    return { ...answer.outputs[0], data: values(answer, answer.outputs[0]) };
  };
  const y = await f(x);
  const v = y.data.map((_, i) => Math.cos(i)); // any cotangent
  const asked = request(x);
  asked.cotangents = [tensor(asked.payloads, y.name, v, y.shape)];
  const answer = await ask(gradients, "ComputeVjp", asked);
  const gradient = values(answer, answer.gradients[0].value);
  const dot = (a, b) => a.reduce((sum, one, i) => sum + one * b[i], 0);
  for (let i = 0; i < x.length; i++) {
    const [up, down] = await Promise.all([1e-5, -1e-5].map((h) => f(x.map((one, j) => (j === i ? one + h : one)))));
    const difference = (dot(v, up.data) - dot(v, down.data)) / 2e-5;
    if (!(Math.abs(gradient[i] - difference) < 1e-6 * (1 + Math.abs(difference)))) throw new Error(`${gradient[i]}, not ${difference}`);
  }
  console.log(`${model.name}: J^T v = [${gradient.join(", ")}], as by central differences`);

  const refused = await ask(gradients, "ComputeVjp", request(x, { wrt: ["nothing"] })).catch((error) => error);
  console.log(`refused: ${errorInfo(refused).reason}: ${refused.details}`);
  await require("./session.js")(open("SessionService"), model.name, name, x, { v, shape: y.shape, gradient });
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
