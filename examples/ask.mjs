// Ask from Node.js, with what every gRPC client has. npm install --prefix examples, then:
// node examples/ask.mjs QUESTION [COLLECTION] [HOST:PORT]
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [question, collection = "default", target = "127.0.0.1:9000"] = process.argv.slice(2);
const definition = protoLoader.loadSync("blockrag/v1/rag.proto", { includeDirs: ["protos"], keepCase: true });
const { RagService } = grpc.loadPackageDefinition(definition).blockrag.v1;
const client = new RagService(target, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("application", "gateway"); // which of the system's services is meant

const call = client.Generate({ question, collection }, metadata);
call.on("data", (event) => process.stdout.write(event.text?.text ?? ""));
call.on("error", (error) => {
  console.error(error.details);
  process.exitCode = 1;
});
call.on("end", () => console.log());
