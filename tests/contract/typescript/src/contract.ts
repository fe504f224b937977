// Uses the generated code as a client would: messages in and out of bytes, and the methods of a service.
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { DurationSchema } from "@bufbuild/protobuf/wkt";

import { Dimension, Priority } from "../gen/paceline/v1/common_pb.js";
import {
  CommitRequestSchema,
  CoordinatorService,
  ReserveRequestSchema,
  ReserveResponseSchema,
} from "../gen/paceline/v1/coordinator_pb.js";
import { Disposition } from "../gen/paceline/v1/outcome_pb.js";

function must(condition: boolean, what: string): asserts condition {
  if (!condition) throw new Error(what);
}

const reservationId = crypto.randomUUID();
const request = create(ReserveRequestSchema, {
  reservationId,
  candidates: [{ target: { model: "claude-sonnet-4-5" }, estimate: { inputTokens: 1200, cachedInputTokens: 0 } }],
  priority: Priority.INTERACTIVE,
  maxWait: create(DurationSchema, { seconds: 5n }),
});
const received = fromBinary(ReserveRequestSchema, toBinary(ReserveRequestSchema, request));
const estimate = received.candidates[0]?.estimate;
must(received.reservationId === reservationId && received.maxWait?.seconds === 5n, "a field was lost on the way");
// Zero is not the same as absent.
must(estimate?.cachedInputTokens === 0, "a zero that was set is gone");
must(estimate.outputTokens === undefined, "a field that was not set is there");

const response = create(ReserveResponseSchema, {
  result: { case: "grant", value: { pool: "anthropic/default/sonnet", context: new Uint8Array([1, 2, 3]) } },
  dimensions: [{ dimension: Dimension.INPUT_TOKENS, level: -5n }],
});
const answer = fromBinary(ReserveResponseSchema, toBinary(ReserveResponseSchema, response));
must(answer.result.case === "grant", "the grant is gone");
must(answer.dimensions[0]?.level === -5n, "a level below zero is gone");

const commit = create(CommitRequestSchema, {
  reservationId,
  context: answer.result.value.context,
  outcome: { disposition: Disposition.SUCCEEDED, usage: { inputTokens: 1200, outputTokens: 250 } },
});
must(commit.context.length === 3, "the context is gone");
must(CoordinatorService.method.session.methodKind === "bidi_streaming", "Session is not a stream both ways");
must(CoordinatorService.typeName === "paceline.v1.CoordinatorService", "the service has another name");

console.log("generated, compiled, and used in a round trip of each message");
