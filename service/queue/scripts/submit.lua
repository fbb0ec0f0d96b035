#!lua
-- Admit and enqueue one job, or say why not. The input pieces were written just before, in the same pipeline.
-- ARGV: mode ("check" only looks), id, tenant, lane, cost, payload bytes, time to live ms, api, op, options, request id,
--       limits of tokens, bytes, items, tenant share (0: none), tokens per second (0: unknown), ms that the record outlives the
--       deadline.
-- Returns {"ok"} or {"dup", state} or {reason, limit, actual, tokens now}.
local id, tenant, lane, cost, bytes, ttl, api = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]),
  tonumber(ARGV[7]), ARGV[8]
local max_tokens, max_bytes, max_items, share, rate = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]),
  tonumber(ARGV[15]), tonumber(ARGV[16])

local function drop()
  for i = 7, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
end

local state = redis.call('HGET', KEYS[1], 'st')
if state then -- the same submit again, after a lost connection
  if not live(state) then
    drop()
  end
  return { 'dup', state }
end

local weight = math.ceil(bytes * 1.25) -- what the allocator takes
local c = redis.call('HMGET', KEYS[3], 'tokens', 'bytes', 'items', 't:' .. tenant)
local tokens, held_bytes, items, mine = tonumber(c[1]) or 0, tonumber(c[2]) or 0, tonumber(c[3]) or 0,
  tonumber(c[4]) or 0
local why
if tokens + cost > max_tokens then
  why = { 'queue_full', max_tokens, tokens + cost }
elseif held_bytes + weight > max_bytes then
  why = { 'queue_full', max_bytes, held_bytes + weight }
elseif items + 1 > max_items then
  why = { 'queue_full', max_items, items + 1 }
elseif share > 0 then
  local active = math.max(0, redis.call('HLEN', KEYS[3]) - 3) + (c[4] and 0 or 1)
  local quota = math.floor(max_tokens * math.max(share, 1 / (active + 1)))
  if mine + cost > quota then
    why = { 'tenant_quota', quota, mine + cost }
  end
end
if not why and rate > 0 and tokens / rate * 1000 > ttl then
  why = { 'would_miss_deadline', math.floor(ttl / 1000), math.ceil(tokens / rate) }
end
if why then
  drop()
  why[4] = tokens
  return why
end
if ARGV[1] == 'check' then
  return { 'ok' }
end
for i = 7, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then -- a piece was refused, its pipeline went on
    drop()
    return { 'queue_full_memory', max_bytes, held_bytes + weight, tokens }
  end
end

local now = now_ms()
local deadline = string.format('%.0f', now + ttl)
local gone = string.format('%.0f', now + ttl + ARGV[17])
local mid = redis.call('XADD', KEYS[2], '*', 'id', id, 'api', api, 'b', ARGV[6])
redis.call('HSET', KEYS[1], 'id', id, 'st', 'queued', 't', tenant, 'lane', lane, 'c', ARGV[5], 'b', ARGV[6], 'dl',
  deadline, 'f', 0, 'n', 0, 'w', '', 'api', api, 'mid', mid, 'op', ARGV[9], 'opt', ARGV[10], 'rid', ARGV[11], 'at',
  ms(now))
redis.call('PEXPIREAT', KEYS[1], gone)
redis.call('HSET', KEYS[4], id, string.format('%d %d %s %s', cost, weight, gone, tenant))
redis.call('HINCRBY', KEYS[3], 'tokens', ARGV[5])
redis.call('HINCRBY', KEYS[3], 'bytes', weight)
redis.call('HINCRBY', KEYS[3], 'items', 1)
redis.call('HINCRBY', KEYS[3], 't:' .. tenant, ARGV[5])
return { 'ok' }
