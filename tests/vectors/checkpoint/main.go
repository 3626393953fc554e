// Makes the vectors of this folder with golang.org/x/mod/sumdb, an implementation of signed notes (C2SP
// signed-note) and of Merkle trees (RFC 6962) that is independent of this project:
//
//	go run . > vectors.json
package main

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type proof struct {
	Size  int64    `json:"size"`
	Index int64    `json:"index"`
	Path  []string `json:"path"`
}

type vectors struct {
	MadeBy      string   `json:"made_by"`
	Seed        string   `json:"seed"`
	Verifier    string   `json:"verifier"`
	Note        string   `json:"note"`
	Text        string   `json:"text"`
	Leaves      []string `json:"leaves"`
	Roots       []string `json:"roots"`
	Inclusion   []proof  `json:"inclusion"`
	Consistency []proof  `json:"consistency"`
}

type storage []tlog.Hash

func (s storage) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		out[i] = s[index]
	}
	return out, nil
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func path(hashes []tlog.Hash) []string {
	out := []string{}
	for _, hash := range hashes {
		out = append(out, hex.EncodeToString(hash[:]))
	}
	return out
}

func main() {
	seed := make([]byte, ed25519.SeedSize)
	for i := range seed {
		seed[i] = byte(i)
	}
	name := "example.com/audit/tenant%201"
	public := ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)
	verifier, err := note.NewEd25519VerifierKey(name, public)
	check(err)
	var id uint32
	fmt.Sscanf(verifier[len(name)+1:len(name)+9], "%08x", &id)
	secret := fmt.Sprintf("PRIVATE+KEY+%s+%08x+%s", name, id,
		base64.StdEncoding.EncodeToString(append([]byte{1}, seed...)))
	signer, err := note.NewSigner(secret)
	check(err)

	out := vectors{MadeBy: "golang.org/x/mod v0.43.0, sumdb/note and sumdb/tlog",
		Seed: hex.EncodeToString(seed), Verifier: verifier}
	var hashes storage
	const size = 21
	for n := int64(0); n < size; n++ {
		data := []byte(fmt.Sprintf("leaf %d", n))
		added, err := tlog.StoredHashes(n, data, hashes)
		check(err)
		hashes = append(hashes, added...)
		leaf := tlog.RecordHash(data)
		out.Leaves = append(out.Leaves, hex.EncodeToString(leaf[:]))
		root, err := tlog.TreeHash(n+1, hashes)
		check(err)
		out.Roots = append(out.Roots, hex.EncodeToString(root[:]))
	}
	for _, whole := range []int64{1, 2, 7, 8, 13, size} {
		for n := int64(0); n < whole; n++ {
			found, err := tlog.ProveRecord(whole, n, hashes)
			check(err)
			out.Inclusion = append(out.Inclusion, proof{whole, n, path(found)})
		}
		for n := int64(1); n <= whole; n++ {
			found, err := tlog.ProveTree(whole, n, hashes)
			check(err)
			out.Consistency = append(out.Consistency, proof{whole, n, path(found)})
		}
	}
	root, err := tlog.TreeHash(size, hashes)
	check(err)
	out.Text = fmt.Sprintf("%s\n%d\n%s\n", name, size, base64.StdEncoding.EncodeToString(root[:]))
	signed, err := note.Sign(&note.Note{Text: out.Text}, signer)
	check(err)
	out.Note = string(signed)
	check(json.NewEncoder(os.Stdout).Encode(out))
}
