// Makes one reservation and commits it, with nothing but the generated stubs: reserve_commit HOST:PORT.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "paceline.dev/go/paceline/v1"
)

const model = "claude-sonnet-4-5"

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: reserve_commit HOST:PORT")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(address string) error {
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	coordinator := pb.NewCoordinatorServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()

	id := uuid.NewString()
	input, output, maximum := int32(1200), int32(300), int32(1024)
	reserved, err := coordinator.Reserve(ctx, &pb.ReserveRequest{
		ReservationId: id,
		Candidates: []*pb.Candidate{{
			Target:   &pb.Target{Model: model},
			Estimate: &pb.Estimate{InputTokens: &input, OutputTokens: &output, MaxOutputTokens: &maximum},
		}},
		Priority: pb.Priority_PRIORITY_INTERACTIVE,
	}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("Reserve: %w", err)
	}
	grant := reserved.GetGrant()
	if grant == nil {
		return fmt.Errorf("Reserve was denied: %v", reserved.GetDenial())
	}
	if grant.GetTarget().GetModel() != model || len(grant.GetContext()) == 0 {
		return fmt.Errorf("the grant lacks its target or its context: %v", grant)
	}

	used, status := int32(250), int32(200)
	committed, err := coordinator.Commit(ctx, &pb.CommitRequest{
		ReservationId: id,
		Context:       grant.GetContext(),
		Outcome: &pb.Outcome{
			Disposition: pb.Disposition_DISPOSITION_SUCCEEDED,
			HttpStatus:  &status,
			Usage:       &pb.Usage{InputTokens: &input, OutputTokens: &used},
		},
	})
	if err != nil {
		return fmt.Errorf("Commit: %w", err)
	}
	for _, settlement := range committed.GetSettlements() {
		if settlement.GetDimension() == pb.Dimension_DIMENSION_OUTPUT_TOKENS && settlement.GetCharged() != int64(used) {
			return fmt.Errorf("%d output tokens were used, but %d charged", used, settlement.GetCharged())
		}
	}
	if len(committed.GetSettlements()) == 0 || committed.GetDuplicate() || committed.GetLate() || committed.GetStale() {
		return fmt.Errorf("the first Commit settled nothing, or was not taken for the first: %v", committed)
	}
	fmt.Printf("reserved and committed in pool %s\n", grant.GetPool())
	return nil
}
