// Ask from Node.js without any file of the protocol: the server describes itself (gRPC reflection).
// npm install --prefix examples, then: node examples/reflect.mjs QUESTION [COLLECTION] [HOST:PORT]
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [question, collection = "default", target = "127.0.0.1:9000"] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();

// What of grpc/reflection/v1alpha/reflection.proto is used here.
const field = (type, id, rule) => ({ type, id, ...(rule && { rule }) });
const reflection = protoLoader.fromJSON({
  nested: {
    grpc: { nested: { reflection: { nested: { v1alpha: { nested: {
      Request: { fields: { fileContainingSymbol: field("string", 4), listServices: field("string", 7) } },
      Files: { fields: { fileDescriptorProto: field("bytes", 1, "repeated") } },
      Service: { fields: { name: field("string", 1) } },
      Services: { fields: { service: field("Service", 1, "repeated") } },
      Failure: { fields: { errorCode: field("int32", 1), errorMessage: field("string", 2) } },
      Response: { fields: { fileDescriptorResponse: field("Files", 4), listServicesResponse: field("Services", 6),
        errorResponse: field("Failure", 7) } },
      ServerReflection: { methods: { ServerReflectionInfo: {
        requestType: "Request", requestStream: true, responseType: "Response", responseStream: true } } },
    } } } } } },
  },
});
const { ServerReflection } = grpc.loadPackageDefinition(reflection).grpc.reflection.v1alpha;
const reflected = new ServerReflection(target, credentials);

const described = (request) =>
  new Promise((resolve, reject) => {
    const call = reflected.ServerReflectionInfo();
    call.on("data", (answer) => (answer.errorResponse ? reject(new Error(answer.errorResponse.errorMessage)) : resolve(answer)));
    call.on("error", reject);
    call.end(request);
  });

/** Serialised files as one FileDescriptorSet: each as field 1, with its length. */
function descriptorSet(files) {
  const length = (bytes) => {
    const coded = [];
    for (let left = bytes; ; left >>>= 7) {
      if (left < 0x80) return Buffer.from([...coded, left]);
      coded.push((left & 0x7f) | 0x80);
    }
  };
  return Buffer.concat(files.flatMap((file) => [Buffer.from([0x0a]), length(file.length), file]));
}

const { listServicesResponse } = await described({ listServices: "*" });
console.log(listServicesResponse.service.map(({ name }) => name).join("\n"));

const { fileDescriptorResponse } = await described({ fileContainingSymbol: "blockrag.v1.RagService" });
const definition = protoLoader.loadFileDescriptorSetFromBuffer(
  descriptorSet(fileDescriptorResponse.fileDescriptorProto), { keepCase: true });
const { RagService } = grpc.loadPackageDefinition(definition).blockrag.v1;
const metadata = new grpc.Metadata();
metadata.set("application", "gateway"); // which of the system's services is meant

const call = new RagService(target, credentials).Generate({ question, collection }, metadata);
call.on("data", (event) => process.stdout.write(event.text?.text ?? ""));
call.on("error", (error) => {
  console.error(error.details);
  process.exitCode = 1;
});
call.on("end", () => console.log());
