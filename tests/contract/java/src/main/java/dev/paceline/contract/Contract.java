package dev.paceline.contract;

import com.google.protobuf.ByteString;
import dev.paceline.v1.Candidate;
import dev.paceline.v1.CommitRequest;
import dev.paceline.v1.CommitResponse;
import dev.paceline.v1.CoordinatorServiceGrpc.CoordinatorServiceBlockingStub;
import dev.paceline.v1.Disposition;
import dev.paceline.v1.Estimate;
import dev.paceline.v1.Outcome;
import dev.paceline.v1.Priority;
import dev.paceline.v1.ReserveRequest;
import dev.paceline.v1.ReserveResponse;
import dev.paceline.v1.Target;
import dev.paceline.v1.Usage;
import java.util.UUID;

/** Uses the generated code as a client would. It only has to compile. */
final class Contract {
  private Contract() {}

  static CommitResponse reserveAndCommit(CoordinatorServiceBlockingStub coordinator) {
    String id = UUID.randomUUID().toString();
    ReserveResponse reserved =
        coordinator.reserve(
            ReserveRequest.newBuilder()
                .setReservationId(id)
                .addCandidates(
                    Candidate.newBuilder()
                        .setTarget(Target.newBuilder().setModel("claude-sonnet-4-5"))
                        .setEstimate(Estimate.newBuilder().setInputTokens(1200).setOutputTokens(300)))
                .setPriority(Priority.PRIORITY_INTERACTIVE)
                .build());
    if (!reserved.hasGrant()) {
      throw new IllegalStateException("denied: " + reserved.getDenial().getMessage());
    }
    ByteString context = reserved.getGrant().getContext();
    return coordinator.commit(
        CommitRequest.newBuilder()
            .setReservationId(id)
            .setContext(context)
            .setOutcome(
                Outcome.newBuilder()
                    .setDisposition(Disposition.DISPOSITION_SUCCEEDED)
                    .setUsage(Usage.newBuilder().setInputTokens(1200).setOutputTokens(250)))
            .build());
  }
}
