-- Become the owner under the next epoch.
-- KEYS: the head
-- ARGV: node, address, nonce, lease_us, lineage, genesis, form, first_form, depose, lag_us, above, primary
--   primary: the identity of the primary that the claimant believes to speak to
-- answer: ok, now, head, head before
--         held, now, head, µs that are left
--         new, now, head: its form is too new
--         moved, now, nil, primary: this is another primary than the claimant believes

local node, address, nonce, lease, lineage, genesis = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local form, first_form, depose, lag, above, primary = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11], ARGV[12]
local now = time()

local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local line = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local here = string.sub(run, 1, 20) .. '/' .. string.sub(line, 1, 20)
if here ~= primary then
  return answer('moved', now, nil, here)
end

local head = load(KEYS[1])
if not head then
  head = {
    int(tonumber(above) + 1), nonce, node, address, '0', genesis, '0', '0', int(now), int(now + tonumber(lease)), '0',
    genesis, lineage, first_form, '', '', '0', '0', '', '', '0', '',
  }
  put_all(KEYS[1], head)
  return answer('ok', now, head, false)
end
if head[NONCE] == nonce then
  return answer('ok', now, head, head)
end
if tonumber(head[FORM]) > tonumber(form) then
  return answer('new', now, head)
end
local free_at = tonumber(head[UNTIL])
if head[LINEAGE] == lineage then
  if head[SUCCESSOR] ~= '' then
    if head[SUCCESSOR] == node then
      free_at = now
    end
  elseif depose ~= '0' and depose == head[EPOCH] then
    free_at = now
  end
else
  free_at = free_at + tonumber(lag)
end
if now < free_at then
  return answer('held', now, head, int(free_at - now))
end
local before = {unpack(head)}
head[EPOCH] = int(math.max(tonumber(head[EPOCH]), tonumber(above)) + 1)
head[NONCE] = nonce
head[NODE] = node
head[ADDRESS] = address
head[CONFIRMED_AT] = int(now)
head[UNTIL] = int(now + tonumber(lease))
head[BASE_SEQ] = head[SEQ]
head[BASE_HASH] = head[HASH]
head[LINEAGE] = lineage
head[SUCCESSOR] = ''
put_all(KEYS[1], head)
return answer('ok', now, head, before)
